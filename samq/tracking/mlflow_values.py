"""A candidate's metrics and parameters for MLflow, under keys that MLflow accepts."""

import math
import re
from collections.abc import Mapping
from typing import Any

from samq import __version__
from samq.errors import SamqError
from samq.records import Plan
from samq.report.table import kept_tensors
from samq.sweep.benchmarking import PRODUCTION
from samq.sweep.selection import Result
from samq.sweep.serving_cost import CostSettings, cost_metrics
from samq.sweep.significance import delta_metrics
from samq.sweep.sweep import MadeFrom, Sweep

# Parameters of any policy.
_POLICY_PARAMETERS = tuple(
    "budget output_guard embedding_guard least_type threshold quantile keep base grouping".split()
)


def legal_metric_name(name: str) -> str:
    """A name that MLflow accepts on every system: letters, digits, `_ - . /` and spaces, without empty path parts.

    lm-eval names a metric with its filter. This drops the filter of `acc,none` and keeps others (`acc_strict-match`).
    """
    name = re.sub(r"[^A-Za-z0-9_\-. /]", "_", name.replace(",none", ""))
    parts = [part for part in name.split("/") if part.strip(".")]
    if not parts:
        raise SamqError(f"{name!r} has no character that MLflow accepts in a metric's name; rename the metric")
    return "/".join(parts)


def metrics_of(result: Result, sweep: Sweep) -> dict[str, float]:
    """All numbers of a candidate under legal names, standard errors as `<name>_stderr`.

    They include the plan's own numbers, which serve as axes of plots. MLflow leaves a run out of parallel coordinates if
    it lacks an axis, so every candidate gets the same numbers wherever they have a meaning:

    - `plan/threshold` is 0 for full precision, which keeps every tensor, and 1 for a stock mixture, which keeps none. A
      budget plan has neither a threshold nor `plan/kept_tensors`.
    - `plan/budget_bytes` of a plan without a budget is the size of its tensors.
    - `plan/predicted_kl_nats` is absent if a type of the plan has no price.
    - `comparison/...` compares with the stock mixture that `samq.sweep.sweep.Sweep.rival` names. It is 0 % for that
      mixture and 100 % for full precision. Without an interval, the ends of the interval are absent.

    A metric that was not measured is absent.
    """
    plan = result.plan
    predicted = result.predicted
    values: dict[str, float | None] = {
        "plan/bits_per_weight": plan.bits_per_weight,
        "plan/kept_tensors": kept_tensors(plan),
        "plan/threshold": _threshold(plan),
        "plan/budget_bytes": float(plan.parameters.get("budget_bytes") or plan.tensor_bytes),
        "plan/predicted_kl_nats": predicted.value if predicted else None,
        "plan/predicted_kl_nats_stderr": predicted.stderr if predicted else None,
        **_against_rival(result, sweep),
    }
    for name, metric in result.evaluation.metrics.items():
        values[legal_metric_name(name)] = metric.value
        values[f"{legal_metric_name(name)}_stderr"] = metric.stderr
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


def benchmark_metrics(result: Result, sweep: Sweep, cost: CostSettings | None) -> dict[str, float]:
    """A candidate's differences on benchmarks from full precision and from production, and its serving cost."""
    values: dict[str, float] = {}
    own = [comparison for comparison in sweep.benchmarks if comparison.candidate == result.name]
    for against, with_production in (("f16", False), (PRODUCTION, True)):
        chosen = [comparison for comparison in own if (comparison.reference == PRODUCTION) is with_production]
        for name, metric in delta_metrics(chosen, against).items():
            values[legal_metric_name(name)] = metric.value
            if metric.stderr is not None:
                values[f"{legal_metric_name(name)}_stderr"] = metric.stderr
    if cost:
        values |= {name: metric.value for name, metric in cost_metrics(result.evaluation, cost).items()}
    return values


def _against_rival(result: Result, sweep: Sweep) -> dict[str, float | None]:
    """How much closer to full precision a candidate is than its rival, a stock mixture, in percent."""
    rival = sweep.rival(result)
    if rival is None:
        return {}
    if result.plan.policy in ("full", "stock"):
        low = reduction = high = 1.0 if result.plan.policy == "full" else 0.0
    else:
        comparison = sweep.comparison(result.name, rival.name)
        if comparison is None:
            return {}
        low, reduction, high = comparison.low, comparison.reduction, comparison.high
    return {
        "comparison/kld_reduction_percent": 100 * reduction,
        "comparison/kld_reduction_low_percent": 100 * low,
        "comparison/kld_reduction_high_percent": 100 * high,
        "comparison/size_difference_percent": 100 * (result.bytes / rival.bytes - 1),
    }


def _threshold(plan: Plan) -> float | None:
    threshold = {"full": 0.0, "stock": 1.0}.get(plan.policy)
    given = plan.parameters.get("threshold")
    return threshold if given is None else float(given)


def params_of(plan: Plan) -> dict[str, str]:
    """The parameters of a candidate: the same keys for every policy, empty if a key has no meaning for it."""
    parameters = {key: plan.parameters.get(key) for key in _POLICY_PARAMETERS}
    return {
        "policy": plan.policy,
        "rounding": plan.rounding,
        **{key: "" if value is None else str(value) for key, value in parameters.items()},
        "mixture": plan.mixture,
    }


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters as one level: `{"a": {"b": 1}}` becomes `{"a.b": "1"}`."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "" if value is None else str(value)
    return flat


def common_params(made_from: MadeFrom) -> dict[str, str]:
    """Parameters that all candidates of a sweep share."""
    return {
        "model": made_from.source.name,
        "revision": made_from.source.revision or "",
        "weights_digest": made_from.source.weights_digest,
        "dataset": made_from.calibration.dataset,
        "dataset_digest": made_from.calibration.tokens_digest,
        "heldout_digest": made_from.heldout.digest(),
        "llama_cpp": made_from.toolchain.version,
        "llama_cpp_build": made_from.toolchain.build,
        "samq": __version__,
    }
