"""The table of full precision, uniform and mixed: what each costs, and what quality it keeps.

Also the costs of serving, and all benchmarks with the significance of their differences. A missing figure says why it is
missing. As `samq.report.prediction`, this gives sections of a report.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from samq import markdown
from samq.evaluation.metrics import MB, VRAM
from samq.records import Evaluation, Metric
from samq.sweep.benchmarking import PRODUCTION
from samq.sweep.selection import BY_SENSITIVITY, Result, percent
from samq.sweep.serving_cost import CostSettings, cost_section
from samq.sweep.significance import JSON_ITEMS, PairedComparison
from samq.sweep.sweep import Sweep

_JSON = "json/valid_percent"
# Metrics by which a benchmark is known, of those that it has; the first that is there is shown.
_HEADLINES = ("exact_match", "acc_norm", "acc", "pass_at_1", "valid")
_SHARES = (
    "acc",
    "exact_match",
    "pass_at_",
    "valid",
    "parsed",
    "prompt_level_",
    "inst_level_",
)  # of items: shown in per cent


@dataclass(frozen=True)
class _Row:
    """A line of the table: its name, and the metric with its format."""

    heading: str
    metric: str
    format: str = ".1f"
    scale: float = 1.0

    @property
    def is_benchmark(self) -> bool:
        return self.metric == _JSON or self.metric.startswith("eval/")

    @property
    def compared(self) -> str:
        """The metric that comparisons item by item are of: for JSON the share of which this is the percentage."""
        return JSON_ITEMS if self.metric == _JSON else self.metric

    @property
    def compared_scale(self) -> float:
        """What a comparison's difference is multiplied with."""
        return 100.0 if self.metric == _JSON else self.scale

    def show(self, metric: Metric | None) -> str:
        if metric is None:
            return "–"
        error = "" if metric.stderr is None else f" ± {metric.stderr * self.scale:{self.format}}"
        return f"{metric.value * self.scale:{self.format}}{error}"

    def show_change(self, metric: Metric | None, base: Metric | None) -> str:
        """Against full precision: benchmarks in points, all else relative; empty if either is missing."""
        if metric is None or base is None:
            return ""
        if self.is_benchmark:
            return f"{(metric.value - base.value) * self.scale:+{self.format}}"
        return percent(metric.value / base.value - 1) if base.value else ""


_MACHINE = (
    _Row("VRAM (MB)", VRAM, scale=1 / MB),
    _Row("p99 latency (ms)", "speed/latency_p99_ms", ".0f"),
    _Row("throughput (tok/s)", "speed/generation_tokens_per_s"),
)
_JSON_ROW = _Row("JSON valid (%)", _JSON)


def scorecard_section(sweep: Sweep, cost: CostSettings | None = None) -> list[str]:
    """Full precision, the uniform candidate (the rule's reference) and the best: memory, speed, benchmarks, costs.

    Empty without a full-precision candidate.
    """
    full, best, uniform = sweep.full, sweep.best, sweep.result(sweep.rule.reference)
    if full is None:
        return []
    shown = [full, *([uniform] if uniform else [])]
    if best is not None and best not in shown:
        shown.append(best)
    rows = [*_MACHINE, *_benchmark_rows([result.evaluation for result in shown])]
    heads = ["", *(_heading(result, best) for result in shown)]
    table = [[row.heading, *(_against_full(row, result, sweep) for result in shown)] for row in rows]
    parts = ["## Full precision, uniform and mixed", markdown.table(heads, table), _LEGEND]
    if best is None:
        parts.append("There is no mixed column: no candidate could be the best.")
    elif best.plan.policy not in BY_SENSITIVITY:
        parts.append(f"There is no mixed column: the best is {best.name}, llama-quantize's own mixture.")
    if gaps := list(_gaps(rows, shown)):
        parts.append(markdown.bullets(gaps))
    return parts + (cost_section(shown, cost) if cost else [])


_LEGEND = (
    "In brackets the change against full precision: relative for memory, latency and throughput, in points for benchmarks; "
    "±: one standard error. VRAM is predicted by llama.cpp for all layers on a GPU; latency and throughput are this machine's."
)


def _heading(result: Result, best: Result | None) -> str:
    return f"{result.name} ★" if best is not None and result.name == best.name else result.name


def _against_full(row: _Row, result: Result, sweep: Sweep) -> str:
    """A figure, with its change against full precision and what can be said of that."""
    metric, full = result.evaluation.metrics.get(row.metric), sweep.full
    text = row.show(metric)
    if full is None or result is full:
        return text
    change = row.show_change(metric, full.evaluation.metrics.get(row.metric))
    if not change:
        return text
    comparison = sweep.benchmark_comparison(row.compared, result.name, full.name)
    if comparison is None or comparison.stderr is None:
        return f"{text} ({change})"
    return f"{text} ({change} ± {comparison.stderr * row.compared_scale:{row.format}}, {comparison.verdict})"


def _benchmark_rows(evaluations: Sequence[Evaluation]) -> list[_Row]:
    """MMLU, GSM8K and JSON, asked or not, and what else was asked."""
    headlines = dict(_headlines(evaluations))
    gsm8k = "gsm8k" if "gsm8k" in headlines or "samq_gsm8k" not in headlines else "samq_gsm8k"
    rows = [
        _eval_row("mmlu", headlines.pop("mmlu", "acc"), evaluations),
        _eval_row(gsm8k, headlines.pop(gsm8k, _HEADLINES[0]), evaluations),
        _JSON_ROW,
    ]
    return rows + [_eval_row(benchmark, metric, evaluations) for benchmark, metric in headlines.items()]


def _headlines(evaluations: Sequence[Evaluation]) -> Iterable[tuple[str, str]]:
    """Each benchmark that was measured, and the metric to show."""
    metrics_of: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for evaluation in evaluations for name in evaluation.metrics):
        prefix, _, rest = name.partition("/")
        benchmark, _, metric = rest.partition("/")
        if prefix == "eval":
            metrics_of.setdefault(benchmark, []).append(metric)
    for benchmark, metrics in metrics_of.items():
        yield benchmark, next((metric for metric in _HEADLINES if metric in metrics), metrics[0])


def _eval_row(benchmark: str, metric: str, evaluations: Sequence[Evaluation]) -> _Row:
    name = f"eval/{benchmark}/{metric}"
    items = next((e.metrics[name].n for e in evaluations if name in e.metrics), None)
    is_share = metric.startswith(_SHARES)
    heading = f"{benchmark}: {metric}{' (%)' if is_share else ''}" + (f", {items} items" if items else "")
    return _Row(heading, name, ".1f" if is_share else ".4f", 100.0 if is_share else 1.0)


def _gaps(rows: Sequence[_Row], shown: Sequence[Result]) -> Iterable[str]:
    """Why figures are not there, a line a row and reason."""
    for row in rows:
        reasons: dict[str, list[str]] = {}
        for result in shown:
            if row.metric not in result.evaluation.metrics:
                reasons.setdefault(why_missing(result.evaluation, row.metric), []).append(result.name)
        for why, names in reasons.items():
            yield f"{row.heading} of {'all' if len(names) == len(shown) else ', '.join(names)}: {why}"


def why_missing(evaluation: Evaluation, metric: str) -> str:
    """Why an evaluation lacks a metric; benchmarks that nobody asked for are no failure."""
    return evaluation.why_missing(metric) or ("not asked" if metric.startswith("eval/") else "not measured")


def benchmark_section(sweep: Sweep) -> list[str]:
    """Every benchmark's metrics of every candidate that was asked, with what can be said against full precision.

    Empty if no candidate was asked any.
    """
    results = [one for one in sweep.by_size if any(name.startswith("eval/") for name in one.evaluation.metrics)]
    if not results:
        return []
    comparisons = sweep.benchmarks
    evaluations = [result.evaluation for result in results]
    names = dict.fromkeys(name for one in evaluations for name in one.metrics if name.startswith("eval/"))
    rows = [_eval_row(name.split("/", 2)[1], name.split("/", 2)[2], evaluations) for name in names]
    table = [[row.heading, *(_against_full(row, one, sweep) for one in results)] for row in rows]
    parts = ["## Benchmarks", markdown.table(["", *(result.name for result in results)], table), _VERDICTS]
    if against := [c for c in comparisons if c.reference == PRODUCTION]:
        parts += ["### Against what is in production", _differences([*rows, _JSON_ROW], results, against), _AGAINST]
    undecided = [c for c in comparisons if c.metric_name in names and c.verdict == "undecided" and c.items_needed]
    if undecided:
        needed = max(c.items_needed for c in undecided if c.items_needed)
        parts.append(f"For a verdict on all that is undecided, some {needed:,} items would be needed.")
    return parts


def _differences(rows: Sequence[_Row], benchmarked: Sequence[Result], against: Sequence[PairedComparison]) -> str:
    """The table of differences from one reference, for what was compared with it."""
    lines = []
    names = list(dict.fromkeys(one.name for one in benchmarked if any(c.candidate == one.name for c in against)))
    for row in rows:
        differences = {c.candidate: c for c in against if c.metric_name == row.compared}
        if differences:
            lines.append([row.heading, *(_difference(row, differences.get(name)) for name in names)])
    return markdown.table(["", *names], lines)


def _difference(row: _Row, comparison: PairedComparison | None) -> str:
    if comparison is None:
        return "–"
    error = "" if comparison.stderr is None else f" ± {comparison.stderr * row.compared_scale:{row.format}}"
    return f"{comparison.difference * row.compared_scale:+{row.format}}{error}, {comparison.verdict}"


_AGAINST = "The change against the version that had the alias `production`, on the same items, in points where it is in per cent."

_VERDICTS = (
    "±: one standard error. In brackets the change against full precision on the same items. Non-inferior: with 95 % "
    "confidence no worse than by the margin (1 % of full precision's value unless set otherwise); inferior: worse by more; "
    "undecided: too few items to tell, however small the change."
)
