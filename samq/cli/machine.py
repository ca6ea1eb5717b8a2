"""Commands about this machine: `samq doctor`, `prune`, `relocate`, `migrate`, `ui` and `up`."""

import os
import signal
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from samq.cli.options import MlflowPort, PrefectPort
from samq.cli.requirements import show_requirements
from samq.cli.start import PROJECT, loading_packages, prepare_prefect, validated
from samq.home import home, store_folder, without_password
from samq.progress import bar, console


def doctor(
    config: Annotated[
        Path | None,
        typer.Option(
            help="Parameter file of `samq requantize`: say what its run needs of this machine, and how long it may take."
        ),
    ] = None,
) -> None:
    """Check this machine, and say how to get what is missing.

    With --config, compare the GPU memory, RAM and disk that a run needs with what is free, before anything starts.
    """
    if config is not None:
        show_requirements(config)
        return
    from samq.doctor import diagnose

    with bar("check this machine"):  # a program's first start may take a minute
        findings = diagnose()
    table = Table("", "component", "found", "advice")
    for finding in findings:
        table.add_row(finding.state, finding.name, finding.detail, finding.advice)
    console.print(table)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


def prune(
    older_than_days: Annotated[
        float | None, typer.Option(min=0, help="What no run has used for this many days may go.")
    ] = None,
    keep_sweeps: Annotated[
        int | None, typer.Option(min=0, help="What none of so many newest sweeps in MLflow has used may go.")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(help="What was used least recently may go, until so much is left, such as 200GB.")
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete it; without this, only show it.")] = False,
    even_if_missing: Annotated[
        bool, typer.Option("--even-if-missing", help="Delete even if a file that an alias points at is missing.")
    ] = False,
) -> None:
    """Show or delete stored files that are no longer needed.

    Deletes them with --delete only. Keeps every GGUF that a registered version in MLflow names, by its SHA-256, and what a run
    at work has used. If a file that an alias points at is missing, the command deletes nothing. With SAMQ_STORE it is about the
    shared store.
    """
    with loading_packages():
        from samq.home import mlflow_uri
        from samq.shared_store import shared_store
        from samq.store import Store
        from samq.tracking.pruning import PruneRules, find_unneeded, remove_unneeded

    given = {"older_than_days": older_than_days, "keep_sweeps": keep_sweeps, "max_bytes": max_bytes}
    rules = validated(PruneRules, **{name: value for name, value in given.items() if value is not None})
    store, shared = Store(store_folder()), shared_store()
    with bar("delete old files" if delete else "look for old files"):
        unneeded = find_unneeded(store, shared, mlflow_uri(), rules, even_if_missing=even_if_missing)
        if delete:
            remove_unneeded(store, shared, unneeded)
    if unneeded.artifacts:
        table = Table("stage", "artifacts", "MB")
        for stage, (count, size) in unneeded.by_stage().items():
            table.add_row(stage, str(count), f"{size / 1e6:,.1f}")
        console.print(table)
    where = shared.uri if shared else store.root
    of_all = f"{unneeded.bytes / 1e6:,.1f} MB of {unneeded.bytes_of_all / 1e6:,.1f} MB in {where}"
    _say(f"freed {of_all}" if delete else f"would free {of_all}; --delete does it")


def relocate(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the changes without making them.")] = False,
) -> None:
    """Make a SAMQ folder that was moved or copied use its own files.

    Rewrites the absolute paths in the folder's MLflow database and store, and shows what changes. Other commands do the same
    for the database when they open it.
    """
    from samq.home import mlflow_uri, registry_uris, sqlite_file
    from samq.relocation import relative_manifests
    from samq.relocation import relocate as rewrite

    for database in filter(None, map(sqlite_file, registry_uris(mlflow_uri()))):
        changes = rewrite(database, dry_run=dry_run)
        for change in changes:
            _say(f"{change.what}: {change.before} -> {change.after}")
        _say(f"{len(changes)} paths in {database}")
    _say(f"{relative_manifests(store_folder(), dry_run=dry_run)} manifests in {store_folder()}")
    _say("nothing was changed" if dry_run else "all paths are those of this folder")


def migrate(
    target: Annotated[str, typer.Argument(help="Empty PostgreSQL database, such as postgresql://USER@HOST/DATABASE.")],
    artifacts: Annotated[
        str | None,
        typer.Option(
            help="Copy reports, plots and plans, too: to what MLflow's server gets as --artifacts-destination."
        ),
    ] = None,
) -> None:
    """Copy MLflow's runs and registry into PostgreSQL.

    Copies the SAMQ folder's SQLite database, all of it or nothing, and leaves it as it is. Give the password by PGPASSWORD or
    ~/.pgpass.
    """
    with loading_packages():
        from samq.tracking.migration import migrate as copy

    with bar("copy MLflow's database") as progress:
        rows = copy(home() / "mlflow.db", target, artifacts, progress)
    _say(f"{sum(rows.values())} rows copied: {rows['runs']} runs, {rows['model_versions']} versions of models")
    served = f" --artifacts-destination {artifacts}" if artifacts else ""
    _say(f"next: mlflow server --backend-store-uri {without_password(target)}{served}")


def _say(line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def ui(
    mlflow_port: MlflowPort = 5000,
    prefect_port: PrefectPort = 4200,
    open_report: Annotated[bool, typer.Option("--open", help="Open the latest sweep's report in the browser.")] = False,
) -> None:
    """Serve the pages of MLflow and Prefect until Ctrl-C.

    Prints the links of the latest sweep: its report, candidates, plots, registered model and flow run.
    """
    import webbrowser

    from samq.services import mlflow_page, prefect_page
    from samq.tracking.tracked import start_page

    prepare_prefect()
    with console.status("start MLflow and Prefect"), ExitStack() as stack:
        mlflow = stack.enter_context(mlflow_page(mlflow_port))
        prefect = stack.enter_context(prefect_page(prefect_port))
        services = stack.pop_all()
    with services:
        links = _latest_links(mlflow, prefect)
        _print_links(links or {"MLflow": start_page(mlflow), "Prefect": prefect})
        if not links:
            console.print("No sweep yet: run `samq demo`.", highlight=False)
        console.print("Press Ctrl-C to stop both servers.", highlight=False)
        if open_report and links:
            webbrowser.open(links["report"])
        _wait_for_signal()


def _latest_links(mlflow: str, prefect: str) -> dict[str, str]:
    """What a page of the latest sweep answers -> its address; empty without a sweep."""
    from samq.tracking.registry import connect
    from samq.tracking.tracked import latest_sweep

    sweep = latest_sweep(connect(mlflow), mlflow)
    return sweep.links(mlflow, prefect) if sweep else {}


def _print_links(links: Mapping[str, str]) -> None:
    width = max(map(len, links))
    for page, address in links.items():
        console.print(f"{page:{width}}  {address}", highlight=False, soft_wrap=True)


def up(mlflow_port: MlflowPort = 5000, prefect_port: PrefectPort = 4200) -> None:
    """Run MLflow, Prefect and a worker until Ctrl-C.

    Creates the deployments of prefect.yaml, such as the nightly run.
    """
    from samq.services import mlflow_page, prefect_page, worker

    prepare_prefect()
    with console.status("start MLflow, Prefect and a worker"), ExitStack() as stack:
        mlflow = stack.enter_context(mlflow_page(mlflow_port))
        os.environ["MLFLOW_TRACKING_URI"] = mlflow  # the worker's runs log to the server, not to its database
        prefect = stack.enter_context(prefect_page(prefect_port))
        stack.enter_context(worker(prefect, PROJECT))
        services = stack.pop_all()
    with services:
        _print_links({"MLflow": mlflow, "Prefect": prefect, **_latest_links(mlflow, prefect)})
        console.print(
            f"To run the demo: PREFECT_API_URL={prefect}/api prefect deployment run requantize/on-demand\n"
            "Press Ctrl-C to stop everything.",
            highlight=False,
            soft_wrap=True,
        )
        _wait_for_signal()


def _wait_for_signal() -> None:
    """Return at Ctrl-C or SIGTERM; exit with code 1 as soon as a service ends by itself."""
    from samq.services import first_ended

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(1):
        if ended := first_ended():
            console.print(f"samq: {ended}", style="red", highlight=False, soft_wrap=True)
            raise typer.Exit(1)
