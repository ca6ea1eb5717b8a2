"""How far predicted KL can be trusted: against what was measured, and against other samples of the same text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from samq.allocation.prices import SECOND_ORDER_LIMIT_NATS, lengthening
from samq.markdown import bullets, table
from samq.records import Metric, PredictionCheck
from samq.sweep.selection import Result, by_size, percent
from samq.sweep.sweep import Sweep

# Below this llama.cpp's own rounding of activations is most of what is measured, and no plan can do better.
FLOOR_NATS = 1e-4
_SIGNIFICANT = 2.0  # standard errors between two figures that are called different


@dataclass(frozen=True)
class PredictionQuality:
    """Predicted against measured KL over all candidates that have both, over the floor."""

    candidates: int
    rank_correlation: float  # Spearman's
    lowest_ratio: float  # of measured to predicted
    highest_ratio: float


def predicted_and_measured(results: Sequence[Result]) -> list[tuple[Result, Metric, Metric]]:
    """(candidate, predicted, measured mean KLD) where both are known and over the floor; the largest candidate first."""
    pairs = [(result, result.predicted, result.kld) for result in by_size(results)]
    return [(result, p, m) for result, p, m in pairs if p and m and min(p.value, m.value) > FLOOR_NATS]


def prediction_quality(results: Sequence[Result]) -> PredictionQuality | None:
    """How well predictions ranked the candidates and met their level; None for fewer than three candidates."""
    pairs = predicted_and_measured(results)
    if len(pairs) < 3:
        return None
    values = pd.DataFrame([(predicted.value, measured.value) for _, predicted, measured in pairs])
    ratios = values[1] / values[0]
    correlation = values[0].rank().corr(values[1].rank())
    return PredictionQuality(len(pairs), float(correlation), float(ratios.min()), float(ratios.max()))


def beyond_second_order(results: Sequence[Result]) -> list[str]:
    """Names of the candidates whose predicted or measured KL is too large for a second-order prediction."""
    pairs = predicted_and_measured(results)
    return [result.name for result, *values in pairs if max(v.value for v in values) > SECOND_ORDER_LIMIT_NATS]


def prediction_section(sweep: Sweep) -> list[str]:
    """Paragraphs of the report on the predictions, in markdown; none if nothing was predicted."""
    results, checks = sweep.results, sweep.checks
    parts, omitted = [], _left_out(results)
    if quality := prediction_quality(results):
        parts.append(
            f"Over {quality.candidates} candidates the rank correlation (Spearman) of predicted and measured KL is "
            f"{quality.rank_correlation:.3f}. Measured mean KLD is {quality.lowest_ratio:.2f} to {quality.highest_ratio:.2f} "
            "times the prediction."
        )
    elif omitted:
        parts.append("Fewer than three candidates are left to correlate predicted and measured KL over.")
    parts += omitted
    if beyond := beyond_second_order(results):
        parts.append(
            f"**Do not trust the prediction of {', '.join(beyond)}**: over {SECOND_ORDER_LIMIT_NATS:g} nats the rounding "
            "is no longer a small change, which the prediction takes it for. What was measured on them holds."
        )
    for types, names in _by_lengthened(results).items():
        parts.append(
            f"**Against other plans' the prediction of {', '.join(names)} is too low**: {lengthening(dict(types))}. What was "
            "measured holds."
        )
    if parts and sweep.routing.experts:
        parts.append(_EXPERTS)
    if sweep.routing.scarce:
        parts.append(
            f"**{sweep.routing}.** What their weights cost is hardly known, and text that needs them may suffer more than was "
            "measured. So plans by budget and by threshold give their tensors at least the type `expert_guard`. Compensated "
            "rounding lets them borrow the inputs of all experts of their layer. Calibrate on more text, or text of more kinds."
        )
    if checks:
        parts += [
            "### On other samples",
            " ".join([_CHECKED, *([_COMPENSATED] if any(map(_compensated, checks)) else [])]),
            _check_table(results, checks),
            bullets(_judgement(check) for check in checks if check.predicted.value > FLOOR_NATS),
        ]
    return ["## Predicted against measured", *parts] if parts else []


def _by_lengthened(results: Sequence[Result]) -> dict[tuple[tuple[str, float], ...], list[str]]:
    """Types that lengthen weights -> names of the plans by budget, which mix them with others, that have just these."""
    plans: dict[tuple[tuple[str, float], ...], list[str]] = {}
    for result in by_size(results):
        if result.lengthened and result.plan.policy == "budget":
            plans.setdefault(tuple(result.lengthened.items()), []).append(result.name)
    return plans


def _left_out(results: Sequence[Result]) -> list[str]:
    """Which candidates the agreement leaves out, and why; none if it leaves out none, or nothing was predicted."""
    measured = [result for result in by_size(results) if result.kld and result.plan.policy != "full"]
    counted = {result.name for result, *_ in predicted_and_measured(results)}
    small = [result.name for result in measured if result.predicted and result.name not in counted]
    unpriced = [result.name for result in measured if not result.predicted]
    if not small and not (unpriced and counted):
        return []
    reasons = [f"Left out of this: {len(small) + len(unpriced)} of {len(measured)}."]
    if small:
        reasons.append(
            f"{', '.join(small)}: predicted or measured at {FLOOR_NATS:g} nats or less, where llama.cpp's own rounding of "
            "activations is most of what is measured."
        )
    if unpriced:
        reasons.append(f"{', '.join(unpriced)}: without a prediction, as a type of the plan has no price.")
    return [" ".join(reasons)]


_EXPERTS = (
    "**This is a mixture of experts, and its predictions are too low**: rounding sends some tokens to other experts, which "
    "the prediction does not count. It can still rank the plans. What was measured holds."
)
_CHECKED = (
    "A plan is chosen by the price table, from the calibration's samples. Here its rounding errors are priced again on "
    "samples that did not choose it: weight by weight, as the table does; with the terms between the weights of a tensor, "
    "which the table leaves out; and with those between tensors. Nats per token, ± one standard error."
)
_COMPENSATED = (
    "Compensated rounding makes single errors larger so that together they do less: weight by weight such a plan looks "
    "worse than it is, and its price, which counts on that, is to be compared with the cost within tensors."
)


def _check_table(results: Sequence[Result], checks: Sequence[PredictionCheck]) -> str:
    measured = {result.name: result.kld for result in results}
    heads = [
        "plan",
        "price table",
        "weight by weight",
        "within tensors",
        "between tensors",
        "measured",
        "other samples",
    ]
    rows = []
    for check in checks:
        figures = (check.predicted, check.additive, check.by_tensor, check.joint, measured.get(check.plan))
        rows.append([check.plan, *map(_show, figures), f"{check.samples} ({check.tokens} tokens)"])
    return table(heads, rows)


def _show(metric: Metric | None) -> str:
    if metric is None:
        return "–"
    return f"{metric.value:.5f}" + (f" ± {metric.stderr:.5f}" if metric.stderr is not None else "")


def _judgement(check: PredictionCheck) -> str:
    """What the figures of a check say, in words."""
    if check.predicted.value <= 0 or check.additive.value <= 0:
        return f"**{check.plan}** rounds nothing."
    comparable = check.by_tensor if _compensated(check) else check.additive  # the terms that the price has
    fits_its_own = comparable.value > check.predicted.value and _differ(comparable, check.predicted)
    return (
        f"**{check.plan}**: on other samples it costs {_change(comparable, check.predicted)} against the table; the "
        f"terms that the table leaves out change that by {_change(check.joint, comparable)}."
        + (" The plan fits the samples that chose it: calibrate on more." if fits_its_own else "")
    )


def _compensated(check: PredictionCheck) -> bool:
    return check.rounding == "compensated"


def _change(new: Metric, old: Metric) -> str:
    return f"{percent(new.value / old.value - 1)} ({'beyond' if _differ(new, old) else 'within'} the error)"


def _differ(one: Metric, other: Metric) -> bool:
    error = math.hypot(one.stderr or 0.0, other.stderr or 0.0)
    return abs(one.value - other.value) > _SIGNIFICANT * error
