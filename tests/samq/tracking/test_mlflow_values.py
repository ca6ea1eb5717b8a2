import dataclasses
import math

import pytest
from mlflow.utils.validation import _validate_metric_name

from samq.errors import SamqError
from samq.records import Metric
from samq.sweep.selection import Comparison
from samq.tracking.mlflow_values import flatten, legal_metric_name, metrics_of, params_of
from tests.samq.sweeps import with_results


@pytest.mark.parametrize(
    ("name", "legal"),
    [
        ("fidelity/mean_kld_nats", "fidelity/mean_kld_nats"),
        ("eval/hellaswag/acc,none", "eval/hellaswag/acc"),
        ("eval/gsm8k/exact_match,strict-match", "eval/gsm8k/exact_match_strict-match"),
        ("eval/gsm8k/exact_match,flexible-extract", "eval/gsm8k/exact_match_flexible-extract"),
        ("/a//b/", "a/b"),
        ("a/../b/./c", "a/b/c"),
        ("tokens per s: 99 %", "tokens per s_ 99 _"),
        ("größe", "gr__e"),
    ],
)
def test_metric_names_become_legal_and_stay_distinct(name, legal):
    assert legal_metric_name(name) == legal
    _validate_metric_name(legal_metric_name(name))


@pytest.mark.parametrize("name", ["", "..", "/"])
def test_a_name_with_nothing_legal_in_it_is_refused(name):
    with pytest.raises(SamqError, match="rename the metric"):
        legal_metric_name(name)


def values_of(sweep):
    return {result.name: metrics_of(result, sweep) for result in sweep.results}


def test_every_candidate_has_the_plans_axes_for_parallel_coordinates(sweep):
    values = values_of(sweep)
    without_base = {"budget-size-of-Q4_K_M", "budget-size-of-Q5_K_M"}
    expected = {"F16": 0.0, "threshold-0.4": 0.4, "threshold-0.2": 0.2, "Q4_K_M": 1.0, "Q5_K_M": 1.0}
    assert {name: v["plan/threshold"] for name, v in values.items() if name not in without_base} == expected
    assert values["F16"]["plan/kept_tensors"] == 29
    assert values["Q4_K_M"]["plan/kept_tensors"] == 0
    keys = {frozenset(v) - {"plan/threshold", "plan/kept_tensors"} for v in values.values()}
    assert len(keys) == 1, "a budget plan has no threshold, and all else that the others have"
    assert not {"plan/threshold", "plan/kept_tensors"} & set(values["budget-size-of-Q4_K_M"])
    for name in values["F16"]:
        _validate_metric_name(name)


def test_a_budget_is_an_axis_and_other_plans_have_what_they_take(sweep):
    budgets = {name: values["plan/budget_bytes"] for name, values in values_of(sweep).items()}
    stock = sweep.result("Q5_K_M").plan.tensor_bytes
    assert budgets["Q5_K_M"] == budgets["budget-size-of-Q5_K_M"] == stock
    assert sweep.result("budget-size-of-Q5_K_M").plan.tensor_bytes < stock
    assert budgets["F16"] == sweep.result("F16").plan.tensor_bytes


def test_predictions_have_their_errors_and_are_absent_where_a_type_has_no_price(sweep):
    result = sweep.result("Q4_K_M")
    values = metrics_of(result, sweep)
    assert values["plan/predicted_kl_nats"] == result.predicted.value
    assert values["plan/predicted_kl_nats_stderr"] == result.predicted.stderr
    assert values_of(sweep)["F16"]["plan/predicted_kl_nats"] == 0
    unpriced = metrics_of(dataclasses.replace(result, predicted=None), sweep)
    assert not [name for name in unpriced if "predicted_kl" in name]


def test_a_candidate_is_held_against_the_mixture_of_its_size(sweep):
    values = values_of(sweep)
    one = sweep.comparison("budget-size-of-Q4_K_M", "Q4_K_M")
    ours = values["budget-size-of-Q4_K_M"]
    assert ours["comparison/kld_reduction_percent"] == 100 * one.reduction
    assert ours["comparison/kld_reduction_low_percent"] == 100 * one.low
    assert ours["comparison/kld_reduction_high_percent"] == 100 * one.high
    assert ours["comparison/size_difference_percent"] == 0
    assert values["Q4_K_M"]["comparison/kld_reduction_percent"] == 0
    assert values["F16"]["comparison/kld_reduction_percent"] == 100
    larger = sweep.result("threshold-0.2").bytes / sweep.result("Q5_K_M").bytes
    assert values["threshold-0.2"]["comparison/size_difference_percent"] == pytest.approx(100 * (larger - 1))


def test_without_mixtures_nothing_is_compared(sweep):
    values = values_of(with_results(sweep, (result for result in sweep.results if result.plan.policy != "stock")))
    assert not [name for one in values.values() for name in one if name.startswith("comparison/")]


def test_an_interval_without_bounds_is_no_metric(sweep):
    rival = Comparison("budget-size-of-Q4_K_M", "Q4_K_M", 0.5, -math.inf, 1.0)
    values = metrics_of(sweep.result(rival.candidate), dataclasses.replace(sweep, comparisons=(rival,)))
    assert "comparison/kld_reduction_low_percent" not in values
    assert values["comparison/kld_reduction_percent"] == 50


def test_standard_errors_are_metrics_where_they_have_a_meaning(sweep):
    result = sweep.result("Q4_K_M")
    values = metrics_of(result, sweep)
    assert values["fidelity/mean_kld_nats_stderr"] == result.kld.stderr
    assert "speed/latency_p99_ms_stderr" not in values
    bare = result.evaluation.model_copy(update={"metrics": {"eval/x/acc,none": Metric(value=0.5, stderr=0.1)}})
    values = metrics_of(dataclasses.replace(result, evaluation=bare), sweep)
    assert values.items() >= {"eval/x/acc": 0.5, "eval/x/acc_stderr": 0.1}.items()


def test_parameters_have_the_same_keys_for_every_policy(sweep):
    params = {result.name: params_of(result.plan) for result in sweep.results}
    assert len({frozenset(values) for values in params.values()}) == 1
    assert params["threshold-0.2"]["threshold"] == "0.2"
    assert params["budget-size-of-Q4_K_M"]["budget"] == "size-of:Q4_K_M"
    assert params["Q4_K_M"]["threshold"] == params["Q4_K_M"]["budget"] == ""


def test_nested_parameters_become_dotted_names():
    nested = {"name": "demo", "calibration": {"dataset": {"name": "humaneval", "split": None}}, "stock": ["Q4_K_M"]}
    assert flatten(nested) == {
        "name": "demo",
        "calibration.dataset.name": "humaneval",
        "calibration.dataset.split": "",
        "stock": "['Q4_K_M']",
    }
