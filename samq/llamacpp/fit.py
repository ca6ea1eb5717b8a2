"""How many layers of a model the GPUs hold, as llama.cpp itself works it out.

llama.cpp's function is `common_fit_params` (common/fit.h; `llama_params_fit` in earlier versions). It is C++, neither llama_cpp
nor libllama has it, and it is not thread safe, since it changes the log of its process. So SAMQ asks llama.cpp's program
`llama-fit-params`, which calls that function and prints the answer as options of llama.cpp's programs. It plans models and
contexts without allocating them, fills one GPU after the other, and moves a mixture's experts to host memory before whole layers.
"""

import logging
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from samq.errors import ToolError
from samq.llamacpp.gpu_share import GpuShare
from samq.llamacpp.process import run
from samq.llamacpp.runtime import PHYSICAL_BATCH_TOKENS, Model, allocated_tokens
from samq.llamacpp.toolchain import environment, find_toolchain, program

logger = logging.getLogger(__name__)

# GPU memory that a plan does not count: what CUDA takes for kernels and products. llama.cpp's own programs leave as much free
# (fit_params_target in its common.h). llama.cpp ends the process where CUDA cannot allocate it.
SPARE_BYTES = 2**30
_MIB = 2**20
HOST = "Host"  # how the program names the processor's memory
_TIMEOUT_S = 600.0
_OPTIONS = re.compile(r'^-c \d+ -ngl (-?\d+)(?: -ts ([\d,]+))?(?: -ot "(.*)")?$', re.MULTILINE)
_PLAN = re.compile(r"^(\w+) (\d+) (\d+) (\d+) *$", re.MULTILINE)  # of a device: weights, context, compute, in MiB


@dataclass(frozen=True)
class Room:
    """The largest context that a model gets."""

    tokens: int  # of each sequence
    sequences: int = 1
    kv_type: str = "F16"

    @property
    def cells(self) -> int:
        """Tokens that the KV cache holds."""
        return allocated_tokens(self.tokens) * self.sequences


def choose_gpu_share(gguf: Path, gpu_layers: int | None, room: Callable[[Model], Room]) -> GpuShare:
    """The layers that the user set, or, if `gpu_layers` is None, as many as the GPUs hold beside the context `room`.

    `room` gets the model without its weights, and is called only where llama.cpp finds a GPU. If llama.cpp cannot tell what
    fits, the log says why, and all layers go to the GPU. Raises SamqError if the file cannot be loaded.
    """
    if gpu_layers is not None:
        return GpuShare(gpu_layers)
    everything = GpuShare.default()
    if everything.layers == 0:
        return everything
    with Model(gguf, allocate=False) as described:
        wanted, layers = room(described), described.layers + 1  # llama.cpp counts the output as a layer
    try:
        share = fit(gguf, wanted)
    except ToolError as error:
        logger.warning("llama.cpp cannot tell how many layers of %s fit the GPU, so all go there: %s", gguf, error)
        return everything
    if share.layers >= 0:
        logger.warning("%s: layers on the GPU: %s; the rest is on the processor", gguf.name, share.describe(layers))
    return share


def fit(gguf: Path, room: Room) -> GpuShare:
    """What the GPUs' free memory holds now of a model with a context of `room`; SPARE_BYTES of each GPU stay free.

    Raises ToolError if the program is missing, or if llama.cpp finds no way.
    """
    return read_options(_ask(gguf, room, "--fit-target", str(SPARE_BYTES // _MIB)))


def planned_gpu_bytes(gguf: Path, share: GpuShare, room: Room) -> int:
    """Bytes on all GPUs together that llama.cpp plans for this share of a model and a context of `room`.

    The context may ask for the logits of all tokens. Each GPU's weights, context and compute buffers are rounded down to MiB.
    Raises ToolError if the program is missing or fails.
    """
    options = ["--fit-print", "on", "--gpu-layers", "all" if share.layers < 0 else str(share.layers)]
    if share.split:
        options += ["--tensor-split", ",".join(f"{part:g}" for part in share.split)]
    if share.overrides:
        options += ["--override-tensor", ",".join(f"{pattern}={name}" for pattern, name in share.overrides)]
    return sum(size for name, size in read_device_bytes(_ask(gguf, room, *options)).items() if name != HOST)


def planned_by_device(gguf: Path, room: Room, *options: str) -> dict[str, int]:
    """Device -> bytes that llama.cpp plans there, and `Host` -> those in the processor's memory, with its programs' options.

    Raises ToolError if the program is missing or fails.
    """
    return read_device_bytes(_ask(gguf, room, "--fit-print", "on", *options))


def read_options(text: str) -> GpuShare:
    """The share in what `llama-fit-params` prints: `-c 4096 -ngl 20 -ts 8,12 -ot "blk\\.3\\.ffn_down.*=CPU,..."`.

    Raises ToolError if it has no such line.
    """
    if not (match := _OPTIONS.search(text)):
        raise ToolError("llama-fit-params did not print -ngl; use the version of llama-cpp-python that SAMQ pins")
    layers, split, overrides = match.groups()
    pairs = (part.rsplit("=", 1) for part in (overrides or "").split(",") if part)
    return GpuShare(
        layers=int(layers),
        split=tuple(float(part) for part in (split or "").split(",") if part),
        overrides=tuple((pattern, name) for pattern, name in pairs),
    )


def read_device_bytes(text: str) -> dict[str, int]:
    """Device -> bytes in what `llama-fit-params --fit-print on` prints: `CUDA0 4096 512 300`, and last the host.

    Raises ToolError if it has no line of the host.
    """
    devices = {name: sum(map(int, sizes)) * _MIB for name, *sizes in _PLAN.findall(text)}
    if HOST not in devices:
        raise ToolError("llama-fit-params printed no plan; use the version of llama-cpp-python that SAMQ pins")
    return devices


def _ask(gguf: Path, room: Room, *options: str) -> str:
    """What `llama-fit-params` prints about a model with this context."""
    toolchain = find_toolchain()
    kind = room.kv_type.lower()
    command: list[str | Path] = [program(toolchain, "llama-fit-params"), "--model", gguf.absolute()]
    command += ["--ctx-size", str(room.cells), "--parallel", str(room.sequences)]
    command += ["--cache-type-k", kind, "--cache-type-v", kind, "--ubatch-size", str(PHYSICAL_BATCH_TOKENS)]
    command.append("--swa-full")  # the library's default, and not that of the programs
    if room.kv_type == "F32":  # as the runtime does
        command += ["--flash-attn", "off"]
    with tempfile.TemporaryDirectory(prefix="samq-") as folder:
        log = Path(folder) / "fit.log"
        try:
            return run([*command, *options], log=log, timeout_s=_TIMEOUT_S, env=environment(toolchain))
        except ToolError as error:
            raise ToolError(str(error).removesuffix(f" (log: {log})")) from error
