"""Commands that put a model into production: `samq promote`, `samq rollback`, `samq status` and `samq serve`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from samq.cli.options import RegisteredModel
from samq.cli.start import PROJECT, loading_packages, prepare_prefect, require_prefect
from samq.progress import bar, console

POLICY = "deployments/promotion/policy.yaml"


def promote(
    name: RegisteredModel,
    version: Annotated[
        str | None, typer.Option(help="Version to promote. [default: the one with the alias candidate]")
    ] = None,
    policy: Annotated[
        Path, typer.Option(help=f"Policy file of the gates (YAML). [default: {POLICY}]", show_default=False)
    ] = PROJECT / POLICY,
    force: Annotated[
        bool,
        typer.Option("--force", help="Promote even if gates fail or MLflow lost the measurements. Needs --reason."),
    ] = False,
    reason: Annotated[str, typer.Option(help="Reason to record.")] = "",
) -> None:
    """Move the production alias to a version that passes the gates.

    If a gate fails, the command changes nothing and exits with code 3.
    """
    with loading_packages():
        from samq.promotion.history import check_reason, describe
        from samq.promotion.policy import load_policy
        from samq.tracking.registry import check_version

    if version is not None:
        check_version(name, version)
    gates = load_policy(policy)
    reason = check_reason(reason, "--force") if force or reason else ""
    prepare_prefect()
    with bar("start Prefect"):
        from flows.promote import PromoteParameters, RefusedError
        from flows.promote import promote as flow
        from samq.promotion.gate_report import gates_table

        require_prefect()
    try:
        promotion = flow(PromoteParameters(model=name, version=version, policy=gates, force=force, reason=reason))
    except RefusedError as refused:
        promotion = refused.promotion
    console.print(gates_table(promotion.judgement.gates))
    console.print(f"{name} {describe(promotion.event)}", highlight=False, soft_wrap=True)
    if promotion.event.action == "refused":
        raise typer.Exit(3)


def rollback(name: RegisteredModel, reason: Annotated[str, typer.Option(help="Reason to record.")]) -> None:
    """Restore the version that was in production before. Run it again to undo.

    Goes by the recorded history, so it also undoes a move of the alias in MLflow.
    """
    with loading_packages():
        from samq.home import mlflow_uri
        from samq.promotion.history import describe
        from samq.promotion.rollback import rollback as swap
        from samq.tracking.registry import connect_registry

    with loading_packages(f"roll back {name}"):  # MLflow imports the most when it connects
        event = swap(connect_registry(mlflow_uri()), name, reason)
    console.print(f"{name} {describe(event)}", highlight=False, soft_wrap=True)


def status(
    name: Annotated[str | None, typer.Argument(help="Name of the registered model. [default: all]")] = None,
    last: Annotated[int, typer.Option(min=1, help="Number of versions and of events to show.")] = 10,
) -> None:
    """Show aliases, versions, and the history of promotions.

    The history includes moves of the production alias that were made in MLflow.
    """
    with loading_packages():
        from samq.home import mlflow_uri
        from samq.promotion.history import history, with_moves_by_hand
        from samq.promotion.status import history_table, rollback_note, status_table
        from samq.tracking.registry import PRODUCTION_ALIAS, aliases, connect_registry, model_names, notable_versions

    with loading_packages("query MLflow"):
        client = connect_registry(mlflow_uri())
        for model in [name] if name else model_names(client):
            by_alias = aliases(client, model)
            console.print(status_table(model, by_alias, notable_versions(client, model, last)))
            if events := with_moves_by_hand(history(client, model), by_alias.get(PRODUCTION_ALIAS))[:last]:
                console.print(history_table(events))
            if note := rollback_note(client, model, by_alias):
                console.print(note, highlight=False, soft_wrap=True)


def serve(
    model: Annotated[str, typer.Argument(help="GGUF file, or models:/NAME@production for a registered model.")],
    config: Annotated[Path | None, typer.Option(help="Settings file (YAML), such as deployments/serving.yaml.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen at. [default: 8000]")] = None,
    allow_without_key: Annotated[
        bool, typer.Option("--allow-without-key", help="Serve other machines even if SAMQ_API_KEY is not set.")
    ] = False,
) -> None:
    """Serve a model over the OpenAI API.

    The server follows the alias without dropping requests. Clients must send the key in SAMQ_API_KEY, if it is set.
    """
    import logging

    with loading_packages():
        from samq.serving.server import serve as run
        from samq.serving.settings import load_settings
        from samq.serving.source import find_source

    key = os.environ.get("SAMQ_API_KEY") or None
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for logger in ("samq", "uvicorn"):
        logging.getLogger(logger).setLevel(logging.INFO)
    settings = load_settings(config, host=host, port=port, api_key=key, allow_without_key=allow_without_key or None)
    run(find_source(model, settings.mmproj), settings)
