"""What a sweep found, for people: the table of all candidates, for terminal and browser, and the choice in words."""

import math
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from samq import __version__, markdown
from samq.sweep.cost import CostSettings
from samq.report.description import describe_plan, substitution_counts, type_counts
from samq.report.prediction import prediction_section
from samq.records import CalibrationSet, Evaluation, ModelSource, Plan, PredictionCheck, TextSet, Toolchain
from samq.report.scorecard import benchmark_section, scorecard_section
from samq.sweep.selection import (
    BY_SENSITIVITY,
    KLD,
    MB,
    VRAM,
    Comparison,
    Failure,
    Result,
    SelectionRule,
    by_size,
    describe_rule,
    exclusion,
    of_its_size,
    pareto,
    percent,
    rival_of,
    stock,
)
from samq.sweep.significance import PairedComparison


@dataclass(frozen=True)
class Column:
    """How a metric is shown: its heading with the unit, the format of value x scale, and which way is better."""

    metric: str
    heading: str
    format: str
    scale: float = 1.0
    lower_is_better: bool = True
    interval: tuple[str, str] | None = None  # metrics with the ends of its confidence interval

    def show(self, evaluation: Evaluation, *, spread: bool = False) -> str:
        """The value as text; with `spread` also its interval or standard error; a dash if it was not measured."""
        metric = evaluation.metrics.get(self.metric)
        if metric is None:
            return "–"
        text = format(metric.value * self.scale, self.format)
        if spread and self.interval and all(name in evaluation.metrics for name in self.interval):
            low, high = (format(evaluation.metrics[name].value * self.scale, self.format) for name in self.interval)
            return f"{text} ({low} to {high})"
        if spread and metric.stderr is not None:
            return f"{text} ± {format(metric.stderr * self.scale, self.format)}"
        return text


KLD_COLUMN = Column(KLD, "mean KLD (nats)", ".5f")
COLUMNS = (
    KLD_COLUMN,
    Column("fidelity/kld_p99_nats", "99 % KLD (nats)", ".4f"),
    Column("fidelity/perplexity_ratio", "PPL ratio", ".4f"),
    Column("fidelity/same_top_percent", "same top (%)", ".2f", lower_is_better=False),
    Column(
        "json/valid_percent",
        "JSON valid (%)",
        ".1f",
        lower_is_better=False,
        interval=("json/valid_low_percent", "json/valid_high_percent"),
    ),
    Column("speed/latency_p99_ms", "p99 latency (ms)", ".0f"),
    Column("speed/time_to_first_token_ms", "first token (ms)", ".0f"),
    Column("speed/generation_tokens_per_s", "speed (tok/s)", ".1f", lower_is_better=False),
    Column(VRAM, "VRAM (MB)", ".1f", scale=1 / MB),
)
PREDICTED = "predicted KL (nats)"
_P999 = Column("fidelity/kld_p999_nats", "99.9 % KLD (nats)", ".4f")
# What fits on 120 characters.
_TERMINAL = tuple(c for c in COLUMNS if c.metric not in ("fidelity/kld_p99_nats", "speed/time_to_first_token_ms"))
_LEGEND = "★ best  ◆ Pareto front: no other is both smaller and closer to full precision"


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


def results_table(results: Sequence[Result], failures: Sequence[Failure]) -> pd.DataFrame:
    """One row a candidate, full precision first, then by size; the failed ones last. Other failures have none.

    Columns carry their units; each metric is followed by its standard error (`± ...`) where one is known. What was not
    measured is NaN. Columns that say something of some candidates only (rounding, threshold, kept tensors, budget), standard
    errors and the predicted KL are left out where no candidate has them.
    """
    front = pareto(results)
    compensated = any(result.plan.rounding == "compensated" for result in results)
    rows: list[dict[str, str | float | int | bool | None]] = []
    for result in by_size(results):
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
            "Pareto": result.name in front,
        }
        for column in COLUMNS:
            metric = result.evaluation.metrics.get(column.metric)
            row[column.heading] = metric.value * column.scale if metric else math.nan
            if metric and metric.stderr is not None:
                row[f"± {column.heading}"] = metric.stderr * column.scale
        rows.append(row | {"status": "measured"})
    rows += [
        {"candidate": f.name, "status": f"failed in {f.stage}: {markdown.one_line(f.reason)}"}
        for f in failures
        if f.of_candidate
    ]
    metrics = [heading for column in COLUMNS for heading in (column.heading, f"± {column.heading}")]
    optional = ["rounding", "budget", "threshold", "kept tensors", PREDICTED, f"± {PREDICTED}", *metrics[1::2]]
    fixed = ["candidate", "policy", "rounding", "budget", "threshold", "kept tensors", "size (MB)", "bits per weight"]
    after_kld = [*metrics[:2], PREDICTED, f"± {PREDICTED}", *metrics[2:]]
    table = pd.DataFrame(rows, columns=[*fixed, *after_kld, "Pareto", "status"])
    return table.drop(columns=[name for name in optional if table[name].isna().all()])


def verdict(
    results: Sequence[Result], best: Result | None, rule: SelectionRule, comparisons: Sequence[Comparison] = ()
) -> str:
    """Which candidate is the best and why, in a few sentences."""
    held_against = _held_against(results)
    if best is None or best.kld is None:
        return f"Nothing was chosen: there are no eligible {describe_rule(rule)} whose mean KLD was measured.{held_against}"
    text = (
        f"{best.name} has the lowest mean KLD of all eligible {describe_rule(rule)}: "
        f"{KLD_COLUMN.show(best.evaluation, spread=True)} nats per token at {best.bytes / MB:.1f} MB "
        f"({best.model.bits_per_weight:.2f} bits per weight)."
    )
    reference = next((result for result in results if result.name == rule.reference and result is not best), None)
    if reference and reference.kld and reference.kld.value > 0:
        compared = next((c for c in comparisons if (c.candidate, c.rival) == (best.name, reference.name)), None)
        change = compared.in_words if compared else f"{percent(best.kld.value / reference.kld.value - 1)} mean KLD"
        text += f" Against {reference.name}: {change}, {percent(best.bytes / reference.bytes - 1)} bytes."
    return text + held_against


def _held_against(results: Sequence[Result]) -> str:
    """A sentence on what SAMQ's plans had to beat, after a space; empty if there are none of them."""
    policies = {result.plan.policy for result in results}
    if "budget" in policies and not any(mixture.kld for mixture in stock(results)):
        return " No plan by budget is eligible, as no stock mixture was measured that it could be held against."
    if "stock" in policies and not policies.isdisjoint(BY_SENSITIVITY):
        return " A plan of SAMQ is eligible only if it beats, with confidence, all mixtures that are no larger or of its size."
    return ""


def markdown_report(
    source: ModelSource,
    calibration: CalibrationSet,
    heldout: TextSet,
    toolchain: Toolchain,
    results: Sequence[Result],
    failures: Sequence[Failure],
    best: Result | None,
    rule: SelectionRule,
    comparisons: Sequence[Comparison] = (),
    checks: Sequence[PredictionCheck] = (),
    benchmarks: Sequence[PairedComparison] = (),
    cost: CostSettings | None = None,
) -> str:
    """The whole story of a sweep: the choice, the table, what fell out and why, what it was made from."""
    ordered = by_size(results)
    parts = [
        f"# {source.name}: {len(results)} candidates measured, {sum(f.of_candidate for f in failures)} failed",
        verdict(results, best, rule, comparisons),
        _markdown_figures(ordered, best),
        f"{_LEGEND}. Bold: the best figure of the quantized. ±: one standard error. JSON: 95 % Wilson interval.",
        *_same_bytes_section(results, comparisons),
        *scorecard_section(results, best, rule.reference, benchmarks, cost),
        *benchmark_section(results, benchmarks),
    ]
    why_not = [(r.name, exclusion(r, results, rule, comparisons)) for r in ordered if r.plan.policy != "full"]
    ineligible = [[name, why] for name, why in why_not if why]
    if ineligible:
        parts += ["## Could not be the best", markdown.table(["candidate", "because"], ineligible)]
    if failures:
        parts += ["## Failed", markdown.bullets(f"**{f.name}** in {f.stage}: {f.reason}" for f in failures)]
    missing = Counter((what, why) for result in ordered for what, why in result.evaluation.missing.items())
    if missing:
        what_and_why = (f"{what} ({count} of {len(results)}): {why}" for (what, why), count in missing.items())
        parts += ["## Not measured", markdown.bullets(what_and_why)]
    parts += prediction_section(results, checks)
    plans = [[r.name, describe_plan(r.plan), type_counts(r.plan), substitution_counts(r.plan)] for r in ordered]
    parts += ["## Plans", markdown.table(["candidate", "plan", "tensors", "replaced, as rows do not allow it"], plans)]
    revision = f", revision {source.revision}" if source.revision else ""
    made_from = (
        f"model: {source.name}{revision}, weights {source.weights_digest[:12]}",
        f"calibration: {calibration.dataset}, {calibration.samples} samples, {calibration.tokens} tokens, "
        f"digest {calibration.tokens_digest[:12]}",
        f"fidelity on: {heldout.dataset}, {len(heldout.texts)} other texts, digest {heldout.digest()[:12]}",
        f"llama.cpp: llama-cpp-python {toolchain.version}, build {toolchain.build}",
        f"SAMQ {__version__}, Python {platform.python_version()}",
    )
    return "\n\n".join([*parts, "## Made from", markdown.bullets(made_from)]) + "\n"


_CHANGE = "change of mean KLD"
_VERDICTS = {"win": "**wins**", "tie": "no difference", "loss": "loses"}


def _same_bytes_section(results: Sequence[Result], comparisons: Sequence[Comparison]) -> list[str]:
    """Each stock mixture and the plans by sensitivity of its size, and the plans by budget whose size no mixture has.

    Empty if the sweep has no plan by sensitivity to hold a verdict on.
    """
    pairs: list[tuple[Result | None, Result | None]] = []
    for mixture in stock(results):
        plans = of_its_size(mixture, results)
        pairs += [(mixture, plan) for plan in plans] if plans else [(mixture, None)]
    shown = {plan.name for _, plan in pairs if plan}
    others = [plan for plan in by_size(results) if plan.plan.policy == "budget" and plan.name not in shown]
    if not shown and not others:
        return []
    pairs += [(rival_of(plan, results), plan) for plan in others]
    rows = [_same_bytes_row(mixture, plan, comparisons) for mixture, plan in pairs]
    heads = ["mixture, bytes", "candidate, bytes", KLD_COLUMN.heading, _P999.heading, PREDICTED, _CHANGE, "verdict"]
    words = f"{_SAME_BYTES} {_OTHER_BYTES}" if others else _SAME_BYTES
    return ["## At the same bytes", words, markdown.table(heads, rows)]


def _same_bytes_row(mixture: Result | None, plan: Result | None, comparisons: Sequence[Comparison]) -> list[str]:
    """The cells of a mixture and a plan; where one of them is missing the other's figures stand alone."""
    sizes = [f"{one.name}, {one.bytes:,}" if one else "–" for one in (mixture, plan)]
    change, said = "–", "no plan of its size" if plan is None else "no mixture to hold it against"
    if mixture and plan:
        sizes[1] += f" ({percent(plan.bytes / mixture.bytes - 1)})"
        found = next((one for one in comparisons if (one.candidate, one.rival) == (plan.name, mixture.name)), None)
        change = found.in_words.replace(" mean KLD", "") if found else "–"
        said = _VERDICTS[found.verdict] if found else "not compared"
    figures = [
        " → ".join(column.show(one.evaluation) for one in (mixture, plan) if one) for column in (KLD_COLUMN, _P999)
    ]
    return [*sizes, *figures, _show_predicted(plan) if plan else "–", change, said]


_SAME_BYTES = (
    "Each stock mixture → the plans of its size that SAMQ chose, on the same held-out tokens. The interval is paired, and "
    "over whole chunks of text since the tokens of a chunk are alike. What does not win is not registered in place of the "
    "mixture."
)
_OTHER_BYTES = (
    "A budget that gave a size no mixture has is held against the largest mixture that is no larger, if there is one, else "
    "against the smallest: the sizes differ, and part of the change is theirs."
)


def _show_predicted(result: Result) -> str:
    """Predicted KL with its standard error; a dash if there is none."""
    if result.predicted is None:
        return "–"
    error = result.predicted.stderr
    return format(result.predicted.value, KLD_COLUMN.format) + (f" ± {error:{KLD_COLUMN.format}}" if error else "")


def terminal_table(results: Sequence[Result], failures: Sequence[Failure], best: Result | None) -> Table:
    """The table for a terminal of 120 columns: the best in green, the best figure of each column in bold."""
    front, ordered = pareto(results), by_size(results)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, caption=_LEGEND, caption_justify="left")
    table.add_column("", min_width=1)
    table.add_column("\n\ncandidate", no_wrap=True)
    predicted = _has_predictions(ordered)  # there is no room for the kept tensors too
    fourth = PREDICTED if predicted else "kept tensors"
    for heading in ("size (MB)", "bits per weight", fourth, *(column.heading for column in _TERMINAL)):
        words = heading.split()
        table.add_column("\n" * (3 - len(words)) + "\n".join(words), justify="right", no_wrap=True)
    best_values = [_best_value(column, ordered) for column in _TERMINAL]
    for result in ordered:
        kept = kept_tensors(result.plan)
        value = _show_predicted(result).split()[0] if predicted else "–" if kept is None else str(kept)
        cells = [f"{result.bytes / MB:.1f}", f"{result.model.bits_per_weight:.2f}", value]
        figures = []
        for column, best_value in zip(_TERMINAL, best_values, strict=True):
            weight = "bold" if _is_best(column, result, best_value) else ""
            figures.append(Text(column.show(result.evaluation, spread=column is KLD_COLUMN), style=weight))
        style = "green" if best and result.name == best.name else "dim" if result.plan.policy == "full" else ""
        table.add_row(_mark(result, best, front), result.name, *cells, *figures, style=style)
    for failure in (one for one in failures if one.of_candidate):
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


def _mark(result: Result, best: Result | None, front: Sequence[str]) -> str:
    if best and result.name == best.name:
        return "★"
    return "◆" if result.name in front and result.plan.policy != "full" else ""


def _markdown_figures(ordered: Sequence[Result], best: Result | None) -> str:
    front = pareto(ordered)
    best_values = [_best_value(column, ordered) for column in COLUMNS]
    heads = ["", "candidate", "size (MB)", "bits per weight", *(column.heading for column in COLUMNS)]
    rows = []
    for result in ordered:
        row = [_mark(result, best, front), result.name]
        row += [f"{result.bytes / MB:.1f}", f"{result.model.bits_per_weight:.2f}"]
        for column, best_value in zip(COLUMNS, best_values, strict=True):
            text = column.show(result.evaluation, spread=True)
            row.append(f"**{text}**" if _is_best(column, result, best_value) else text)
        rows.append(row)
    if _has_predictions(ordered):
        place = heads.index(KLD_COLUMN.heading) + 1
        heads.insert(place, PREDICTED)
        for row, result in zip(rows, ordered, strict=True):
            row.insert(place, _show_predicted(result))
    return markdown.table(heads, rows)


def _has_predictions(results: Sequence[Result]) -> bool:
    return any(result.predicted for result in results if result.plan.policy != "full")
