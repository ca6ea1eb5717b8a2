"""What `samq doctor --config` prints."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from samq.cli.start import loading_packages
from samq.progress import bar, console

if TYPE_CHECKING:
    from flows.requirements import Requirements

GIB, GB = 2**30, 10**9


def show_requirements(config: Path) -> None:
    """Print what each stage of a parameter file's run needs; exit with code 1 if this machine does not have it."""
    with loading_packages():
        from flows.parameters import load_parameters
        from flows.requirements import estimate

    parameters = load_parameters(config)
    with bar("measure this machine") as progress:
        needed = estimate(parameters, progress)
    console.print(_stages(needed))
    console.print(_resources(needed))
    unknown = [stage.name for stage in needed.stages if stage.seconds is None]
    without = f", without {' and '.join(unknown)}" if unknown else ""
    for line in (
        f"about {duration(needed.seconds)} in all{without}",
        "Times are estimates from short tests on this machine, while its other programs run.",
        "All figures are for an empty store and sequences of full length. Stages that the store has take no time.",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    lacking = [resource for resource in needed.resources if not resource.suffices]
    for resource in lacking:
        line = f"samq: {resource.stage} needs more {resource.name} than is free; {resource.advice}"
        console.print(line, style="red", highlight=False, soft_wrap=True)
    if lacking:
        raise typer.Exit(1)


def _stages(needed: "Requirements") -> Table:
    has_gpu = any(resource.name == "GPU memory" for resource in needed.resources)
    table = Table("stage", "what", *(["GPU memory (GiB)"] if has_gpu else []), "RAM (GiB)", "disk (GB)", "time")
    for stage in needed.stages:
        taken = stage.taken
        gpu = [_in(GIB, taken.gpu)] if has_gpu else []
        disk = [_in(GB, taken.kept), f"{_in(GB, taken.scratch)} for a time"]
        shown = " + ".join(part for part, size in zip(disk, (taken.kept, taken.scratch), strict=True) if size)
        table.add_row(stage.name, stage.what, *gpu, _in(GIB, taken.ram), shown, duration(stage.seconds))
    return table


def _resources(needed: "Requirements") -> Table:
    table = Table("", "resource", "needed", "free", "most in")
    for resource in needed.resources:
        unit, size = ("GB", GB) if "disk" in resource.name else ("GiB", GIB)
        sizes = [f"{amount / size:,.1f} {unit}" for amount in (resource.needed, resource.free)]
        table.add_row("ok" if resource.suffices else "TOO LITTLE", resource.name, *sizes, resource.stage)
    return table


def _in(unit: int, size: int) -> str:
    """A size in a unit; empty for nothing."""
    return f"{size / unit:,.1f}" if size else ""


def duration(seconds: float | None) -> str:
    """A time in words: `under 1 s`, `40 s`, `12 min`, `3.5 h`."""
    if seconds is None:
        return "not estimated"
    if seconds < 1:
        return "under 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
