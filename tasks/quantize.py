"""Stage: GGUFs, one a plan."""

from pathlib import Path

from samq import quantizer
from samq.progress import bar
from samq.quantizer import GGUF_NAME, IMATRIX_NAME
from samq.records import Toolchain
from samq.store import Artifact
from tasks.plan import load_plan
from tasks.stage import stage

MODEL_NAME = "quantized-model.json"


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
