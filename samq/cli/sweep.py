"""Commands that run the whole flow: `samq demo` and `samq requantize`."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from samq.cli.options import NoImatrix
from samq.cli.start import PROJECT, loading_packages, prepare_prefect, require_prefect
from samq.progress import bar, console

if TYPE_CHECKING:
    from flows.requantize import FinishedSweep


def demo(
    config: Annotated[Path | None, typer.Option(help="Parameter file. [default: the demo's own]")] = None,
) -> None:
    """Re-quantize SmolLM2-135M-Instruct on HumanEval, in minutes.

    Compares full precision, Q4_K_M, two budget plans (the size of Q4_K_M and 90 MB), and a threshold plan.
    """
    deployments = PROJECT / "deployments"
    _run(config or deployments / "parameters" / "demo.yaml", deployments / "promotion" / "demo.yaml")


def requantize(
    config: Annotated[Path, typer.Option(help="Parameter file (YAML), such as those in deployments/parameters/.")],
    no_imatrix: NoImatrix = False,
    skip_unchanged: Annotated[
        bool,
        typer.Option("--skip-unchanged", help="Do nothing if nothing changed since the last run with this option."),
    ] = False,
) -> None:
    """Run the whole flow that a parameter file describes.

    Converts, calibrates, plans, quantizes, evaluates, reports and registers, and tracks everything in MLflow.
    """
    policy = PROJECT / "deployments" / "promotion" / "policy.yaml"
    _run(config, policy, no_imatrix=no_imatrix, skip_unchanged=skip_unchanged)


def _run(config: Path, policy: Path, *, no_imatrix: bool = False, skip_unchanged: bool = False) -> None:
    """Run the flow; `policy` is the file of gates that the next commands name."""
    prepare_prefect()
    with loading_packages():
        from flows.parameters import load_parameters

    parameters = load_parameters(config)
    if no_imatrix:
        calibration = parameters.calibration.model_copy(update={"imatrix": False})
        parameters = parameters.model_copy(update={"calibration": calibration})
    with bar("start Prefect"), ThreadPoolExecutor(1) as pool:  # both take some 10 s
        server = pool.submit(require_prefect)
        from flows.nightly import nightly
        from samq.tracking.nights import Unchanged

        if not skip_unchanged:
            from flows.requantize import requantize as flow
        server.result()
    finished = nightly(parameters) if skip_unchanged else flow(parameters)
    if isinstance(finished, Unchanged):
        console.print(finished.summary, highlight=False, soft_wrap=True)
    else:
        _show(finished, policy)


def _show(finished: "FinishedSweep", policy: Path) -> None:
    """Print what the sweep found, where MLflow has it, and the next commands."""
    from samq.report.next_steps import next_commands
    from samq.report.table import terminal_table

    sweep = finished.sweep
    typer.echo()
    console.print(terminal_table(sweep))
    for failure in sweep.failures:
        console.print(f"failed in {failure.stage}: {failure.name}: {failure.reason}", style="red")
    if sweep.best:
        console.print(f"best: {sweep.best.name}  {sweep.best.gguf}", highlight=False, soft_wrap=True)
    if sweep.made_from.mmproj:
        console.print(f"vision or audio part: {sweep.made_from.mmproj}", highlight=False, soft_wrap=True)
    best = sweep.best.gguf if sweep.best else None
    for line in (*finished.tracked.summary(), *next_commands(finished.tracked.registered_model, best, policy)):
        console.print(line, highlight=False, soft_wrap=True)
