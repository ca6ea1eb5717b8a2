"""The gates' verdicts for people: Markdown for a page, a table for a terminal."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from samq import markdown
from samq.promotion.gates import Gate
from samq.promotion.history import Event, describe
from samq.promotion.move import Judgement

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


def gates_table(gates: Sequence[Gate]) -> Table:
    """The gate report for a terminal."""
    table = Table("", "gate", "value", "limit", "reason", box=box.SIMPLE_HEAD)
    for gate in gates:
        cells = (Text(text) for text in (_MARKS[gate.verdict], gate.name, gate.value, gate.limit, gate.reason))
        table.add_row(*cells, style=_STYLES[gate.verdict])
    return table
