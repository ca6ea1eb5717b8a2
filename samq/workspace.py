"""Where and with what a pipeline works: the store, llama.cpp, the device, the time limit."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from samq.home import store_folder
from samq.llamacpp.process import PROGRAM_TIMEOUT_S
from samq.llamacpp.toolchain import converter_build, find_toolchain
from samq.records import Toolchain


@dataclass(frozen=True)
class Workspace:
    """What every stage is given, beside its inputs.

    Nothing of it is in a stage's key but what the stage names in `keyed_by`.
    """

    store: Path  # root of the artifact store
    toolchain: Toolchain  # llama.cpp's programs
    device: str = "auto"  # torch's: auto (all GPUs, else the CPU), cpu, or cuda:0
    timeout_s: float = PROGRAM_TIMEOUT_S  # limit of each program of llama.cpp
    memory_limit: int | None = None  # bytes of the device's memory that torch may take; None: what is free
    scratch: Path | None = None  # where a stage that was killed finds what it had done; only for stages that can go on

    @classmethod
    def here(
        cls, *, device: str = "auto", timeout_s: float = PROGRAM_TIMEOUT_S, memory_limit: int | None = None
    ) -> Self:
        """The store of the SAMQ folder, with the llama.cpp that is installed; raises ToolError if there is none."""
        return cls(store_folder(), find_toolchain(), device, timeout_s, memory_limit)

    @property
    def compute_device(self) -> str:
        """The device that torch computes on, for `auto`: cuda if there is a GPU, else cpu."""
        from samq.sensitivity.memory import compute_device  # torch takes seconds to import

        return compute_device(self.device)

    def contents(self, names: Iterable[str]) -> dict[str, Toolchain | str | None]:
        """What the output of a stage depends on, by the names of `keyed_by`.

        - `toolchain`: the build of llama.cpp's programs.
        - `converter`: the build of the converter's scripts, which the programs' build leaves out.
        - `device`: `cpu` or `cuda`. The two round sums differently; two GPUs of a machine do not.
        """
        return {name: self._content(name) for name in names}

    def _content(self, name: str) -> Toolchain | str | None:
        match name:
            case "toolchain":
                return self.toolchain
            case "converter":
                return converter_build(self.toolchain)
            case "device":
                return self.compute_device.partition(":")[0]
            case _:
                raise ValueError(f"a workspace has no {name} that a stage could be keyed by")
