"""Stages: GGUFs, one a plan."""

from dataclasses import replace
from pathlib import Path

from samq.files import COMPENSATED_NAME, GGUF_NAME, IMATRIX_NAME, QUANTIZED_NAME
from samq.llamacpp import programs
from samq.progress import bar
from samq.quantization import assembly
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.ladder import open_ladder
from tasks.plan import load_plan
from tasks.stage import stage
from tasks.target import Target


@stage("quantize", version=1, run_name="quantize {name}", keyed_by=("toolchain",))
def quantize(
    at: Workspace, folder: Path, name: str, target: Target, plan: Artifact, provenance: dict[str, str]
) -> None:
    """`model.gguf` as the plan says, audited, and `quantized-model.json`."""
    with bar(f"quantize {name}") as progress:
        model = programs.quantize(
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


@stage("assemble", version=1, run_name="assemble {name}")
def assemble(
    at: Workspace,
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
        open_ladder(full, rungs), compensated=[rung.path(COMPENSATED_NAME) for rung in compensated.values()]
    )
    with bar(f"assemble {name}") as progress:
        model = assembly.assemble(ladder, load_plan(plan), folder, provenance=provenance, progress=progress)
    model.save(folder / QUANTIZED_NAME)
