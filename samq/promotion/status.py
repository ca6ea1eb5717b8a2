"""A model's aliases, versions and history for a terminal."""

import re
from collections.abc import Mapping, Sequence

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from rich import box
from rich.table import Table
from rich.text import Text

from samq.errors import SamqError, UnreachableError
from samq.promotion.history import Event
from samq.promotion.rollback import rollback_target
from samq.tracking.registry import PREVIOUS_ALIAS, PRODUCTION_ALIAS

_BYTES_PER_MB = 1e6


def status_table(name: str, aliases: Mapping[str, str], versions: Sequence[ModelVersion]) -> Table:
    """The versions of a registered model with their aliases."""
    table = Table(
        "version", "aliases", "candidate", "MB", "sha256", title=name, title_justify="left", box=box.SIMPLE_HEAD
    )
    for version in versions:
        number, tags = str(version.version), version.tags
        names = sorted(alias for alias, aliased in aliases.items() if aliased == number)
        size = tags.get("size_bytes", "")
        size = f"{int(size) / _BYTES_PER_MB:.1f}" if re.fullmatch("[0-9]+", size) else "–"
        cells = (number, ", ".join(names), tags.get("candidate", "–"), size, tags.get("sha256", "–")[:12])
        table.add_row(*(Text(cell) for cell in cells), style="green" if PRODUCTION_ALIAS in names else "")
    return table


def history_table(events: Sequence[Event]) -> Table:
    """Promotions, refusals, rollbacks and moves by hand, in the order given."""
    table = Table("time", "user", "version", "action", "gates", "reason", box=box.SIMPLE_HEAD)
    for event in events:
        gates = ": ".join(part for part in (event.verdict, ", ".join(event.failed)) if part)
        version = event.version or "–"
        table.add_row(event.at, Text(event.who), version, event.action, Text(gates), Text(event.reason))
    return table


def rollback_note(client: MlflowClient, name: str, aliases: Mapping[str, str]) -> str | None:
    """Where a rollback leads, or why nowhere, if that is not what the alias `previous` says; None if it is."""
    previous = aliases.get(PREVIOUS_ALIAS)
    says = f"the alias previous names version {previous}" if previous else "there is no alias previous"
    try:
        target = rollback_target(client, name, aliases)
    except UnreachableError:
        raise
    except SamqError as error:
        return f"a rollback is not possible: {error}" if previous else None
    return (
        None
        if target == previous
        else f"{says}, but `samq rollback {name}` goes to version {target}, which served last"
    )
