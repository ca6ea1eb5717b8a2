"""The gates' verdicts and a model's history for people: Markdown for a page, tables for a terminal."""

from collections.abc import Mapping, Sequence

from mlflow.entities.model_registry import ModelVersion
from rich import box
from rich.table import Table
from rich.text import Text

from samq import markdown
from samq.evaluation.metrics import MB
from samq.promotion.gates import Gate
from samq.promotion.history import Event
from samq.promotion.move import Judgement
from samq.tracking.registry import PRODUCTION_ALIAS

_MARKS = {"pass": "✓", "fail": "✗", "not applicable": "–"}
_STYLES = {"pass": "", "fail": "red", "not applicable": "dim"}


def markdown_gates(judgement: Judgement, event: Event) -> str:
    """The gate report: the decision and its reason, then the verdict, value and limit of each gate."""
    version = judgement.version
    rows = [
        (f"{_MARKS[gate.verdict]} {gate.verdict}", gate.name, gate.value, gate.limit, gate.reason)
        for gate in judgement.gates
    ]
    facts = [
        f"GGUF: {version.uri}, sha256 `{version.sha256}`",
        f"in production before: {'version ' + judgement.production if judgement.production else 'nothing'}",
        f"by {event.who} at {event.at}" + (f", reason: {event.reason}" if event.reason else ""),
    ]
    return "\n\n".join(
        (
            f"# {version.name}: {describe(event)}",
            markdown.bullets(facts),
            markdown.table(("verdict", "gate", "value", "limit", "reason"), rows),
        )
    )


def describe(event: Event) -> str:
    """The decision in one line."""
    instead = f" in place of version {event.replaced}" if event.replaced else ""
    match event.action:
        case "promoted":
            by_force = f", by force: {', '.join(event.failed)} failed" if event.failed else ""
            return f"version {event.version} is in production{instead}{by_force}"
        case "kept":
            return f"version {event.version} is already in production"
        case "rolled back":
            return f"version {event.version} is in production again{instead}"
        case "refused":
            return f"version {event.version} is refused: {', '.join(event.failed)} failed"


def gates_table(gates: Sequence[Gate]) -> Table:
    """The gate report for a terminal."""
    table = Table("", "gate", "value", "limit", "reason", box=box.SIMPLE_HEAD)
    for gate in gates:
        cells = (Text(text) for text in (_MARKS[gate.verdict], gate.name, gate.value, gate.limit, gate.reason))
        table.add_row(*cells, style=_STYLES[gate.verdict])
    return table


def status_table(name: str, aliases: Mapping[str, str], versions: Sequence[ModelVersion]) -> Table:
    """The versions of a registered model with their aliases."""
    table = Table(
        "version", "aliases", "candidate", "MB", "sha256", title=name, title_justify="left", box=box.SIMPLE_HEAD
    )
    for version in versions:
        number, tags = str(version.version), version.tags
        names = sorted(alias for alias, aliased in aliases.items() if aliased == number)
        size = f"{int(tags['size_bytes']) / MB:.1f}" if "size_bytes" in tags else "–"
        cells = (number, ", ".join(names), tags.get("candidate", "–"), size, tags.get("sha256", "–")[:12])
        table.add_row(*(Text(cell) for cell in cells), style="green" if PRODUCTION_ALIAS in names else "")
    return table


def history_table(events: Sequence[Event]) -> Table:
    """Promotions, refusals and rollbacks, in the order given."""
    table = Table("time", "user", "version", "action", "gates", "reason", box=box.SIMPLE_HEAD)
    for event in events:
        gates = ": ".join(part for part in (event.verdict, ", ".join(event.failed)) if part)
        table.add_row(event.at, Text(event.who), event.version, event.action, Text(gates), Text(event.reason))
    return table
