from dataclasses import replace

import pandas as pd
import pytest

from samq.errors import SamqError
from samq.files import EVALUATION_NAME, ITEMS_NAME
from samq.records import Evaluation, Metric
from samq.report.markdown_report import markdown_report
from samq.sweep.benchmarking import PRODUCTION, compare_benchmarks, items_of, join_items, with_benchmarks
from samq.sweep.selection import Comparison, SelectionRule, finalists
from samq.sweep.serving_cost import CostSettings
from samq.sweep.significance import JSON_ITEMS
from samq.tracking.mlflow_values import benchmark_metrics

RIGHT = {"F16": [1, 1, 1, 0], "Q4_K_M": [0, 1, 0, 0], "threshold-0.2": [1, 1, 0, 1]}


def table(values, first=0):
    rows = {
        "benchmark": "samq_hellaswag",
        "task": "samq_hellaswag",
        "item": range(first, first + len(values)),
        "document": [f"document {item}" for item in range(first, first + len(values))],
        "metric": "acc",
        "value": [float(value) for value in values],
        "higher_is_better": True,
        "answer": "[-1.0, -2.0]",
    }
    return pd.DataFrame(rows)


def benchmarked(result, values, folder, first=0):
    """The result with the benchmark's folder, as the stage leaves it."""
    folder.mkdir()
    table(values, first).to_parquet(folder / ITEMS_NAME)
    metrics = {"eval/samq_hellaswag/acc": Metric(value=sum(values) / len(values), stderr=0.2, n=len(values))}
    Evaluation(name=result.name, sha256="0" * 64, metrics=metrics).save(folder / EVALUATION_NAME)
    return with_benchmarks(result, [folder], {"eval/mmlu": "the data of mmlu cannot be had"})


@pytest.fixture
def results(sweep, tmp_path):
    return [
        benchmarked(result, RIGHT[result.name], tmp_path / result.name) if result.name in RIGHT else result
        for result in sweep.results
    ]


def named(results, name):
    return next(result for result in results if result.name == name)


def test_a_result_gets_the_benchmarks_beside_what_was_measured_before(sweep, results):
    before, after = sweep.result("Q4_K_M").evaluation, named(results, "Q4_K_M").evaluation
    assert after.metrics == before.metrics | {"eval/samq_hellaswag/acc": Metric(value=0.25, stderr=0.2, n=4)}
    assert after.missing == before.missing | {"eval/mmlu": "the data of mmlu cannot be had"}
    assert list(items_of(named(results, "Q4_K_M"))["value"]) == RIGHT["Q4_K_M"]
    assert items_of(sweep.result("Q4_K_M")).empty


def test_those_asked_are_compared_with_full_precision_and_with_production(results):
    comparisons = compare_benchmarks(results, 0.01, table([1, 1, 1, 1]))
    assert {(one.candidate, one.reference): one.difference for one in comparisons} == {
        ("Q4_K_M", "F16"): -0.5,
        ("Q4_K_M", PRODUCTION): -0.75,
        ("threshold-0.2", "F16"): 0.0,
        ("threshold-0.2", PRODUCTION): -0.25,
    }
    assert compare_benchmarks(results, 0.01) == [one for one in comparisons if one.reference == "F16"]


def test_production_whose_json_was_measured_too_is_compared(results):
    answers = pd.DataFrame({"id": ["invoice", "weather"], "valid": [True, False]})
    production = join_items(answers, table([1, 1, 1, 1]))
    comparisons = compare_benchmarks(results, 0.01, production)
    assert [one for one in comparisons if one.reference == PRODUCTION] == [
        one for one in compare_benchmarks(results, 0.01, table([1, 1, 1, 1])) if one.reference == PRODUCTION
    ]
    assert {one.difference for one in comparisons if one.reference == PRODUCTION} == {-0.75, -0.25}


def test_answers_to_json_prompts_are_compared_for_all_that_gave_any(results, sweep):
    answers = {"F16": [True, True, False], "Q4_K_M": [True, False, False], "Q5_K_M": [True, True, True]}
    for name, valid in answers.items():
        pd.DataFrame({"id": ["a", "b", "c"], "valid": valid}).to_parquet(sweep.result(name).folder / "json.parquet")
    production = join_items(pd.DataFrame({"id": ["a", "b", "c"], "valid": [True, True, True]}), None)
    comparisons = [one for one in compare_benchmarks(results, 0.01, production) if one.metric_name == JSON_ITEMS]
    assert {(one.candidate, one.reference): one.difference for one in comparisons} == {
        ("Q4_K_M", "F16"): pytest.approx(-1 / 3),
        ("Q4_K_M", PRODUCTION): pytest.approx(-2 / 3),
        ("Q5_K_M", "F16"): pytest.approx(1 / 3),
        ("Q5_K_M", PRODUCTION): 0,
    }
    assert "json/valid_delta_vs_f16" in benchmark_metrics(
        named(results, "Q5_K_M"), replace(sweep, results=tuple(results), benchmarks=tuple(comparisons)), None
    )
    assert set(items_of(named(results, "Q4_K_M"))["benchmark"]) == {"samq_hellaswag"}, (
        "MLflow has the answers beside it"
    )


def test_production_asked_otherwise_is_left_out_and_a_candidate_is_an_error(results, sweep, tmp_path, caplog):
    comparisons = compare_benchmarks(results, 0.01, table([1, 1, 1, 1], first=7))
    assert comparisons == compare_benchmarks(results, 0.01)
    assert "not compared with production on samq_hellaswag" in caplog.text
    other = benchmarked(sweep.result("Q5_K_M"), [1, 1, 1, 1], tmp_path / "other", first=7)
    with pytest.raises(SamqError, match="not asked the same items of samq_hellaswag"):
        compare_benchmarks([*results, other], 0.01)


def test_mlflow_gets_the_differences_and_the_cost(sweep, results):
    compared = tuple(compare_benchmarks(results, 0.01, table([1, 1, 1, 1])))
    values = benchmark_metrics(
        named(results, "Q4_K_M"),
        replace(sweep, results=tuple(results), benchmarks=compared),
        CostSettings(price_per_gpu_hour=2.5, gpu_memory_bytes=10**12),
    )
    assert values["eval/samq_hellaswag/acc_delta_vs_f16"] == -0.5
    assert values["eval/samq_hellaswag/acc_delta_vs_production"] == -0.75
    assert values["eval/samq_hellaswag/acc_delta_vs_f16_stderr"] > 0
    assert values["eval/samq_hellaswag/acc_non_inferior_vs_f16"] == 0
    assert values["cost/gpus_needed"] == 1 and values["cost/month_usd"] == 2.5 * 730


def test_the_report_has_the_table_of_benchmarks_and_says_why_figures_are_missing(sweep, results):
    compared = tuple(compare_benchmarks(results, 0.01, table([1, 1, 1, 1])))
    # So that the best is one that was asked.
    wins = tuple(Comparison("threshold-0.2", mixture, 0.4, 0.3, 0.5) for mixture in ("Q4_K_M", "Q5_K_M"))
    rule = SelectionRule(max_size_ratio=1.6)
    benchmarked_sweep = replace(sweep, results=tuple(results), benchmarks=compared, comparisons=wins, rule=rule)
    assert benchmarked_sweep.best is named(results, "threshold-0.2")
    report = markdown_report(benchmarked_sweep)
    assert "## Full precision, uniform and mixed" in report and "## Benchmarks" in report
    assert "### Against what is in production\n\n|  | threshold-0.2 | Q4_K_M |" in report
    assert "| samq_hellaswag: acc (%), 4 items | -25.0 ± 25.0, undecided | -75.0 ± 25.0, " in report
    assert "mmlu: acc (%) of all: the data of mmlu cannot be had" in report


def test_benchmarks_are_for_full_precision_the_best_its_rival_and_the_front(sweep):
    best = sweep.result("threshold-0.2")
    assert finalists(sweep.results, best, "best") == ["F16", "threshold-0.2", "Q5_K_M"]
    assert finalists(sweep.results, best, "front") == [
        *("F16", "threshold-0.2", "Q5_K_M"),
        *("budget-size-of-Q5_K_M", "budget-size-of-Q4_K_M"),
    ]
    assert finalists(sweep.results, None, "best") == ["F16"]
    assert len(finalists(sweep.results, None, "all")) == len(sweep.results)
