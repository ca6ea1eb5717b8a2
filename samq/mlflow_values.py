"""What MLflow gets to know of a candidate: its metrics and parameters, under keys that MLflow accepts."""

import re
from collections.abc import Mapping
from typing import Any

from samq import __version__
from samq.errors import SamqError
from samq.records import CalibrationSet, Evaluation, ModelSource, Plan, TextSet, Toolchain
from samq.report import kept_tensors


def legal_metric_name(name: str) -> str:
    """A name that MLflow accepts on every system: letters, digits, `_ - . /` and spaces, and a tidy path.

    lm-eval names a metric with its filter, `acc,none`: no filter is left out, another stays (`acc_strict-match`).
    """
    name = re.sub(r"[^A-Za-z0-9_\-. /]", "_", name.replace(",none", ""))
    parts = [part for part in name.split("/") if part.strip(".")]
    if not parts:
        raise SamqError(f"{name!r} has nothing that MLflow accepts in a metric's name; rename the metric")
    return "/".join(parts)


def metrics_of(plan: Plan, evaluation: Evaluation) -> dict[str, float]:
    """Everything numeric of a candidate under legal names, standard errors as `<name>_stderr`.

    The plan's own figures are among them, for axes of plots: `plan/threshold` is 0 for full precision, which keeps every
    tensor, and 1 for a stock mixture, which keeps none. What was not measured is absent.
    """
    values: dict[str, float | None] = {
        "plan/bits_per_weight": plan.bits_per_weight,
        "plan/kept_tensors": kept_tensors(plan),
        "plan/threshold": _threshold(plan),
        "plan/predicted_kl_nats": plan.predicted_kl_nats,
    }
    for name, metric in evaluation.metrics.items():
        values[legal_metric_name(name)] = metric.value
        values[f"{legal_metric_name(name)}_stderr"] = metric.stderr
    return {name: float(value) for name, value in values.items() if value is not None}


def _threshold(plan: Plan) -> float | None:
    threshold = {"full": 0.0, "stock": 1.0}.get(plan.policy)
    given = plan.parameters.get("threshold")
    return threshold if given is None else float(given)


def params_of(plan: Plan) -> dict[str, str]:
    """What a candidate is: the same keys for every policy, empty where they have no meaning."""
    asked = {key: plan.parameters.get(key) for key in ("threshold", "quantile", "keep", "base", "grouping")}
    return {
        "policy": plan.policy,
        **{key: "" if value is None else str(value) for key, value in asked.items()},
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


def common_params(
    source: ModelSource, calibration: CalibrationSet, heldout: TextSet, toolchain: Toolchain
) -> dict[str, str]:
    """What all candidates of a sweep have in common."""
    return {
        "model": source.name,
        "revision": source.revision or "",
        "weights_digest": source.weights_digest,
        "dataset": calibration.dataset,
        "dataset_digest": calibration.tokens_digest,
        "heldout_digest": heldout.digest(),
        "llama_cpp": toolchain.version,
        "llama_cpp_build": toolchain.build,
        "samq": __version__,
    }
