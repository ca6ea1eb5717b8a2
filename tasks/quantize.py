"""Stage: GGUFs, one a plan."""

from dataclasses import replace
from pathlib import Path

from samq.quantization import assembly
from samq.llamacpp import programs as quantizer
from samq.progress import bar
from samq.llamacpp.programs import GGUF_NAME, IMATRIX_NAME
from samq.records import Toolchain
from samq.store import Artifact
from tasks.plan import load_plan
from tasks.price import open_ladder
from tasks.stage import stage

MODEL_NAME, COMPENSATED_NAME = "quantized-model.json", "compensated.gguf"


@stage("quantize", version=1, run_name="quantize {name}")
def quantize(
    folder: Path,
    name: str,
    full: Artifact,
    plan: Artifact,
    imatrix: Artifact | None,
    provenance: dict[str, str],
    toolchain: Toolchain,
    timeout_s: float,
) -> None:
    """`model.gguf` as the plan says, audited, and `quantized-model.json`."""
    with bar(f"quantize {name}") as progress:
        model = quantizer.quantize(
            full.path(GGUF_NAME),
            load_plan(plan),
            folder,
            toolchain,
            provenance=provenance,
            imatrix=imatrix.path(IMATRIX_NAME) if imatrix else None,
            timeout_s=timeout_s,
            progress=progress,
        )
    model.save(folder / MODEL_NAME)


@stage("assemble", version=1, run_name="assemble {name}")
def assemble(
    folder: Path,
    name: str,
    full: Artifact,
    plan: Artifact,
    rungs: dict[str, Artifact],
    compensated: dict[str, Artifact],
    provenance: dict[str, str],
) -> None:
    """The files of `quantize`, byte for byte, from the ladder's rungs that hold the plan's types.

    For a plan of compensated rounding, tensors are taken from `compensated` (rung -> artifact of `compensate_rung`) where
    those have them.
    """
    ladder = replace(
        open_ladder(full, rungs), compensated=[made.path(COMPENSATED_NAME) for made in compensated.values()]
    )
    with bar(f"assemble {name}") as progress:
        model = assembly.assemble(ladder, load_plan(plan), folder, provenance=provenance, progress=progress)
    model.save(folder / MODEL_NAME)
