"""Stage: the ladder, every quantizable tensor at one type a rung."""

from collections.abc import Sequence
from pathlib import Path

from prefect import task

from samq.allocation.threshold import ThresholdPolicy
from samq.allocation.ladder import make_rung, rung_names, threshold_types
from samq.progress import bar
from samq.records import Toolchain
from samq.store import Artifact
from tasks.convert import open_target
from tasks.plan import load_plan
from tasks.stage import stage


@stage("rung", version=1, run_name="ladder {name}")
def rung(
    folder: Path, name: str, full: Artifact, imatrix: Artifact | None, toolchain: Toolchain, timeout_s: float
) -> None:
    """`model.gguf`: every quantizable tensor at the type `name`, or at llama-quantize's fallback for its rows."""
    with bar(f"ladder {name}") as progress:
        target = open_target(full, imatrix, toolchain)
        make_rung(target, name, folder, provenance={}, timeout_s=timeout_s, progress=progress)


@task(name="choose rungs")
def choose_rungs(
    full: Artifact,
    imatrix: Artifact | None,
    types: Sequence[str],
    plans: list[Artifact],
    toolchain: Toolchain,
    policy: ThresholdPolicy | None = None,
) -> list[str]:
    """The rungs that hold these types and plans, and the threshold plans of a policy."""
    target = open_target(full, imatrix, toolchain)
    wanted = {*types, *(threshold_types(target, policy) if policy else ())}
    made = [load_plan(plan) for plan in plans]
    return rung_names(target.quantizable.values(), wanted, imatrix=imatrix is not None, plans=made)
