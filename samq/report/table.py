"""The table of all candidates: for data frames, for the terminal, and for Markdown."""

import math
from collections.abc import Sequence

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from samq import markdown
from samq.evaluation.metrics import COLUMNS, KLD_COLUMN, MB, SPEED_COLUMN, Column
from samq.records import Plan
from samq.sweep.selection import Result, percent
from samq.sweep.sweep import Sweep

PREDICTED = "predicted KL (nats)"
# What fits on 120 characters.
_TERMINAL = tuple(c for c in COLUMNS if c.metric not in ("fidelity/kld_p99_nats", "speed/time_to_first_token_ms"))
LEGEND = "★ best  ◆ Pareto front: no other is both smaller and closer to full precision"


def kept_tensors(plan: Plan) -> int | None:
    """How many tensors the plan lifted out of its base type; None for a policy that has no base type."""
    match plan.policy:
        case "full":
            return len(plan.types)
        case "stock":
            return 0
        case _:
            kept = plan.parameters.get("kept_tensors")
            return None if kept is None else int(kept)


def results_table(sweep: Sweep) -> pd.DataFrame:
    """One row for each candidate, full precision first, then by size; the failed ones last. Other failures have none.

    Columns carry their units; each metric is followed by its standard error (`± ...`) where one is known. What was not
    measured is NaN. Some columns are left out where no candidate has them: rounding, threshold, kept tensors, budget, standard
    errors and the predicted KL.
    """
    compensated = any(result.plan.rounding == "compensated" for result in sweep.results)
    rows: list[dict[str, str | float | int | bool | None]] = []
    for result in sweep.by_size:
        row: dict[str, str | float | int | bool | None] = {
            "candidate": result.name,
            "policy": result.plan.policy,
            "rounding": result.plan.rounding if compensated else None,
            "budget": result.plan.parameters.get("budget"),
            "threshold": result.plan.parameters.get("threshold"),
            "kept tensors": kept_tensors(result.plan),
            "size (MB)": result.bytes / MB,
            "bits per weight": result.model.bits_per_weight,
            PREDICTED: result.predicted.value if result.predicted else math.nan,
            f"± {PREDICTED}": result.predicted.stderr if result.predicted else math.nan,
            "Pareto": result.name in sweep.front,
        }
        for column in COLUMNS:
            metric = result.evaluation.metrics.get(column.metric)
            row[column.heading] = metric.value * column.scale if metric else math.nan
            if metric and metric.stderr is not None:
                row[f"± {column.heading}"] = metric.stderr * column.scale
        rows.append(row | {"status": "measured"})
    rows += [{"candidate": f.name, "status": f"failed in {f.stage}: {markdown.one_line(f.reason)}"} for f in sweep.lost]
    metrics = [heading for column in COLUMNS for heading in (column.heading, f"± {column.heading}")]
    optional = ["rounding", "budget", "threshold", "kept tensors", PREDICTED, f"± {PREDICTED}", *metrics[1::2]]
    fixed = ["candidate", "policy", "rounding", "budget", "threshold", "kept tensors", "size (MB)", "bits per weight"]
    after_kld = [*metrics[:2], PREDICTED, f"± {PREDICTED}", *metrics[2:]]
    table = pd.DataFrame(rows, columns=[*fixed, *after_kld, "Pareto", "status"])
    return table.drop(columns=[name for name in optional if table[name].isna().all()])


def show_predicted(result: Result) -> str:
    """Predicted KL with its standard error; a dash if there is none."""
    if result.predicted is None:
        return "–"
    error = result.predicted.stderr
    return format(result.predicted.value, KLD_COLUMN.format) + (f" ± {error:{KLD_COLUMN.format}}" if error else "")


def terminal_table(sweep: Sweep) -> Table:
    """The table for a terminal of 120 columns: the best in green, the best figure of each column in bold."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, caption=LEGEND, caption_justify="left")
    table.add_column("", min_width=1)
    table.add_column("\n\ncandidate", no_wrap=True)
    predicted = _has_predictions(sweep)  # there is no room for the kept tensors too
    fourth = PREDICTED if predicted else "kept tensors"
    for heading in ("size (MB)", "bits per weight", fourth, *(column.heading for column in _TERMINAL)):
        words = heading.split()
        table.add_column("\n" * (3 - len(words)) + "\n".join(words), justify="right", no_wrap=True)
    best_values = [_best_value(column, sweep.results) for column in _TERMINAL]
    for result in sweep.by_size:
        kept = kept_tensors(result.plan)
        value = show_predicted(result).split()[0] if predicted else "–" if kept is None else str(kept)
        cells = [f"{result.bytes / MB:.1f}", f"{result.model.bits_per_weight:.2f}", value]
        figures = []
        for column, best_value in zip(_TERMINAL, best_values, strict=True):
            weight = "bold" if _is_best(column, result, best_value) else ""
            figures.append(Text(column.show(result.evaluation, spread=column is KLD_COLUMN), style=weight))
        style = "green" if result is sweep.best else "dim" if result.plan.policy == "full" else ""
        table.add_row(_mark(result, sweep), result.name, *cells, *figures, style=style)
    for failure in sweep.lost:
        table.add_row("✗", failure.name, "", "", "", f"{failure.stage} failed", style="red")
    return table


def _best_value(column: Column, results: Sequence[Result]) -> float | None:
    """The best figure that a quantized candidate has in a column; None if they do not differ."""
    quantized = [result.evaluation.metrics for result in results if result.plan.policy != "full"]
    values = [metrics[column.metric].value for metrics in quantized if column.metric in metrics]
    if len(set(values)) < 2:
        return None
    return min(values) if column.lower_is_better else max(values)


def _is_best(column: Column, result: Result, best_value: float | None) -> bool:
    metric = result.evaluation.metrics.get(column.metric)
    return metric is not None and metric.value == best_value and result.plan.policy != "full"


def _mark(result: Result, sweep: Sweep) -> str:
    if result is sweep.best:
        return "★"
    return "◆" if result.name in sweep.front and result.plan.policy != "full" else ""


def markdown_table(sweep: Sweep) -> str:
    """The table with all figures; the best figure of each column in bold."""
    best_values = [_best_value(column, sweep.results) for column in COLUMNS]
    heads = ["", "candidate", "size (MB)", "bits per weight", *(column.heading for column in COLUMNS)]
    rows = []
    for result in sweep.by_size:
        row = [_mark(result, sweep), result.name]
        row += [f"{result.bytes / MB:.1f}", f"{result.model.bits_per_weight:.2f}"]
        for column, best_value in zip(COLUMNS, best_values, strict=True):
            text = column.show(result.evaluation, spread=True)
            row.append(f"**{text}**" if _is_best(column, result, best_value) else text)
        rows.append(row)
    if _has_predictions(sweep):
        place = heads.index(KLD_COLUMN.heading) + 1
        heads.insert(place, PREDICTED)
        for row, result in zip(rows, sweep.by_size, strict=True):
            row.insert(place, show_predicted(result))
    return markdown.table(heads, rows)


def _has_predictions(sweep: Sweep) -> bool:
    return any(result.predicted for result in sweep.results if result.plan.policy != "full")


def choice_table(sweep: Sweep) -> str:
    """Markdown of the five columns that people choose by."""
    rows = []
    for result in sweep.by_size:
        rival = sweep.rival(result)
        comparison = sweep.comparison(result.name, rival.name) if rival else None
        change = f"{percent(-comparison.reduction)} against {comparison.rival}" if comparison else "–"
        name = f"**{result.name}** ★" if result is sweep.best else result.name
        figures = (KLD_COLUMN.show(result.evaluation), change, SPEED_COLUMN.show(result.evaluation))
        rows.append([name, f"{result.bytes / MB:.1f}", *figures])
    heads = ["candidate", "size (MB)", KLD_COLUMN.heading, "change of mean KLD", SPEED_COLUMN.heading]
    return markdown.table(heads, rows)
