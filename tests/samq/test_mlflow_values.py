import pytest
from mlflow.utils.validation import _validate_metric_name

from samq.errors import SamqError
from samq.mlflow_values import flatten, legal_metric_name, metrics_of, params_of
from samq.records import Metric


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


def test_every_candidate_has_the_plans_axes_for_parallel_coordinates(sweep):
    axes = {name: metrics_of(one.plan, one.evaluation) for name, one in ((r.name, r) for r in sweep.results)}
    assert {name: values["plan/threshold"] for name, values in axes.items()} == {
        "F16": 0.0,
        "threshold-0.4": 0.4,
        "threshold-0.2": 0.2,
        "Q4_K_M": 1.0,
    }
    assert axes["F16"]["plan/kept_tensors"] == 29
    assert axes["Q4_K_M"]["plan/kept_tensors"] == 0
    assert len({frozenset(values) for values in axes.values()}) == 1
    for name in axes["F16"]:
        _validate_metric_name(name)


def test_standard_errors_are_metrics_where_they_have_a_meaning(sweep):
    result = sweep.result("Q4_K_M")
    values = metrics_of(result.plan, result.evaluation)
    assert values["fidelity/mean_kld_nats_stderr"] == result.kld.stderr
    assert "speed/latency_p99_ms_stderr" not in values
    bare = result.evaluation.model_copy(update={"metrics": {"eval/x/acc,none": Metric(value=0.5, stderr=0.1)}})
    assert metrics_of(result.plan, bare).items() >= {"eval/x/acc": 0.5, "eval/x/acc_stderr": 0.1}.items()


def test_parameters_have_the_same_keys_for_every_policy(sweep):
    params = {result.name: params_of(result.plan) for result in sweep.results}
    assert len({frozenset(values) for values in params.values()}) == 1
    assert params["threshold-0.2"]["threshold"] == "0.2"
    assert params["Q4_K_M"]["threshold"] == ""


def test_nested_parameters_become_dotted_names():
    nested = {"name": "demo", "calibration": {"dataset": {"name": "humaneval", "split": None}}, "stock": ["Q4_K_M"]}
    assert flatten(nested) == {
        "name": "demo",
        "calibration.dataset.name": "humaneval",
        "calibration.dataset.split": "",
        "stock": "['Q4_K_M']",
    }
