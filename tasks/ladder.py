"""Stage: the ladder, every quantizable tensor at one type a rung."""

from collections.abc import Collection, Iterable
from pathlib import Path

from samq.allocation.ladder import Ladder, make_rung, rung_names, threshold_types
from samq.allocation.threshold import ThresholdPolicy
from samq.files import GGUF_NAME
from samq.progress import bar
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.plan import load_plan
from tasks.stage import stage, step
from tasks.target import Target


@stage("rung", version=1, run_name="ladder {name}", keyed_by=("toolchain",))
def rung(at: Workspace, folder: Path, name: str, target: Target) -> None:
    """`model.gguf`: every quantizable tensor at the type `name`, or at llama-quantize's fallback for its rows."""
    with bar(f"ladder {name}") as progress:
        make_rung(target.open(at.toolchain), name, folder, provenance={}, timeout_s=at.timeout_s, progress=progress)


@step("choose rungs")
def choose_rungs(
    at: Workspace,
    target: Target,
    types: Collection[str],
    plans: Iterable[Artifact] = (),
    policy: ThresholdPolicy | None = None,
) -> list[str]:
    """The rungs that hold these types and plans, and the threshold plans of a policy."""
    opened = target.open(at.toolchain)
    wanted = {*types, *(threshold_types(opened, policy) if policy else ())}
    return rung_names(
        opened.quantizable.values(), wanted, imatrix=target.imatrix is not None, plans=map(load_plan, plans)
    )


def open_ladder(full: Artifact, rungs: dict[str, Artifact]) -> Ladder:
    """The full-precision GGUF and its rungs, as files."""
    return Ladder(full.path(GGUF_NAME), {name: rung.path(GGUF_NAME) for name, rung in rungs.items()})
