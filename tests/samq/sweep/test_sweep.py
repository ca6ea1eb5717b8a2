from dataclasses import replace

import pytest

from samq.records import Metric
from samq.sweep import selection
from samq.sweep.selection import Failure, SelectionRule
from samq.sweep.significance import PairedComparison
from tests.samq.sweeps import with_results

RULES = (SelectionRule(), SelectionRule(max_size_ratio=1.6), SelectionRule(reference=None), SelectionRule(max_bytes=1))


@pytest.mark.parametrize("rule", RULES)
def test_the_choice_is_that_of_the_rule_over_results_and_comparisons(sweep, rule):
    sweep = replace(sweep, rule=rule)
    assert sweep.best is selection.choose(sweep.results, rule, sweep.comparisons)
    for result in sweep.results:
        assert sweep.why_not(result) == selection.exclusion(result, sweep.results, rule, sweep.comparisons)
        assert result is not sweep.best or sweep.why_not(result) is None
    for which in ("front", "best", "all"):
        assert sweep.finalists(which) == selection.finalists(sweep.results, sweep.best, which)


def test_another_rule_or_other_comparisons_are_another_choice(sweep):
    chosen = {name: replace(sweep, rule=rule).best for name, rule in zip("abcd", RULES, strict=True)}
    assert chosen["a"].name == chosen["b"].name == "budget-size-of-Q5_K_M" and chosen["d"] is None
    assert sweep.best.plan.policy == "budget", "known before the copy is made"
    assert replace(sweep, comparisons=()).best.name == "Q5_K_M", "what was not compared is not known to be better"


def test_orders_and_rivals_are_those_of_the_results(sweep):
    assert sweep.by_size == selection.by_size(sweep.results)
    assert sweep.front == selection.pareto(sweep.results)
    assert sweep.stock == selection.stock(sweep.results) != []
    for result in sweep.results:
        assert sweep.rival(result) is selection.rival_of(result, sweep.results)
    for mixture in sweep.stock:
        assert sweep.of_its_size(mixture) == selection.of_its_size(mixture, sweep.results) != []


def test_results_and_comparisons_are_found_by_name(sweep):
    assert [sweep.result(result.name) for result in sweep.results] == list(sweep.results)
    assert sweep.result("nobody") is sweep.result(None) is None
    assert sweep.full is sweep.result("F16")
    assert with_results(sweep, sweep.results[1:]).full is None
    assert [sweep.comparison(one.candidate, one.rival) for one in sweep.comparisons] == list(sweep.comparisons)
    assert sweep.comparison("Q4_K_M", "budget-size-of-Q4_K_M") is None, "only the other way round"


def test_a_comparison_on_a_benchmark_is_found_by_metric_candidate_and_reference(sweep):
    def comparison(benchmark, metric, candidate, reference):
        return PairedComparison(
            benchmark=benchmark, metric=metric, candidate=candidate, reference=reference, items=4, value=0.5,
            reference_value=0.75, difference=-0.25, stderr=0.1, low=-0.5, high=0.1, p=0.5, test="McNemar",
            higher_is_better=True, margin=0.01, least=-0.4, verdict="undecided", items_needed=None,
        )  # fmt: skip

    benchmarks = tuple(
        comparison(benchmark, metric, candidate, reference)
        for benchmark, metric in (("mmlu", "acc"), ("json", "valid"))
        for candidate in ("Q4_K_M", "Q5_K_M")
        for reference in ("F16", "production")
    )
    sweep = replace(sweep, benchmarks=benchmarks)
    for one in benchmarks:
        assert sweep.benchmark_comparison(one.metric_name, one.candidate, one.reference) is one
    assert sweep.benchmark_comparison("json/valid", "Q4_K_M", "F16") in benchmarks
    assert sweep.benchmark_comparison("eval/mmlu/acc", "F16", "Q4_K_M") is None


def test_a_failed_check_or_rung_costs_no_candidate(sweep):
    others = (Failure("Q2_K", "ladder", "it hung"), Failure("Q4_K_M", "check", "out of memory"))
    assert replace(sweep, failures=(*others, *sweep.failures)).lost == list(sweep.failures) != []


def test_a_candidate_without_a_kld_is_neither_on_the_front_nor_chosen(sweep):
    sweep = replace(sweep, rule=SelectionRule(max_size_ratio=1.6))
    metrics = {"memory/file_bytes": Metric(value=1.0)}
    evaluation = sweep.best.evaluation.model_copy(update={"metrics": metrics})
    unmeasured = replace(sweep.best, evaluation=evaluation)
    others = [result for result in sweep.results if result is not sweep.best]
    without = with_results(sweep, [*others, unmeasured])
    assert without.why_not(unmeasured) == "mean KLD was not measured"
    assert unmeasured.name not in without.front
    assert without.best not in (None, unmeasured)
