"""Stage: a plan's GGUF by llama-quantize."""

from pathlib import Path

from samq.files import GGUF_NAME, IMATRIX_NAME, QUANTIZED_NAME
from samq.llamacpp.quantize import quantize as llama_quantize
from samq.progress import bar
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.plan import load_plan
from tasks.stage import stage
from tasks.target import Target


@stage("quantize", version=1, run_name="quantize {name}", keyed_by=("toolchain",))
def quantize(
    at: Workspace, folder: Path, name: str, target: Target, plan: Artifact, provenance: dict[str, str]
) -> None:
    """`model.gguf` as the plan says, audited, and `quantized-model.json`."""
    with bar(f"quantize {name}") as progress:
        model = llama_quantize(
            target.full.path(GGUF_NAME),
            load_plan(plan),
            folder,
            at.toolchain,
            provenance=provenance,
            imatrix=target.imatrix.file(IMATRIX_NAME) if target.imatrix else None,
            timeout_s=at.timeout_s,
            progress=progress,
        )
    model.save(folder / QUANTIZED_NAME)
