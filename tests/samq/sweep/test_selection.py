import dataclasses

import pytest

from samq.evaluation.metrics import KLD, VRAM
from samq.records import Metric
from samq.sweep.selection import (
    Comparison,
    SelectionRule,
    by_size,
    choose,
    describe_rule,
    exclusion,
    of_its_size,
    pareto,
    rival_of,
)


def with_figures(result, *, size=None, **metrics):
    """A copy of a result with another size or other metrics; a metric of None is taken away."""
    model = result.model.model_copy(update={"file_bytes": size or result.bytes})
    kept = dict(result.evaluation.metrics)
    for name, value in metrics.items():
        name = {"kld": KLD, "vram": VRAM}[name]
        kept.pop(name)
        if value is not None:
            kept[name] = Metric(value=value)
    evaluation = result.evaluation.model_copy(update={"metrics": kept})
    return dataclasses.replace(result, model=model, evaluation=evaluation)


def against(rival, candidate, low, high):
    """A comparison whose interval is given as reductions of mean KLD."""
    return Comparison(candidate, rival, (low + high) / 2, low, high)


WINS = [against("Q4_K_M", name, 0.3, 0.5) for name in ("threshold-0.4", "threshold-0.2")]


@pytest.fixture
def trio(sweep):
    """Q4_K_M of 100 MB and two thresholds, at 108 and 120 MB."""
    return [
        with_figures(sweep.result("F16"), size=270_000_000),
        with_figures(sweep.result("Q4_K_M"), size=100_000_000, kld=0.05, vram=150e6),
        with_figures(sweep.result("threshold-0.4"), size=108_000_000, kld=0.03, vram=158e6),
        with_figures(sweep.result("threshold-0.2"), size=120_000_000, kld=0.01, vram=170e6),
    ]


def test_full_precision_comes_first_and_then_the_largest(trio):
    assert [result.name for result in by_size(trio[::-1])] == ["F16", "threshold-0.2", "threshold-0.4", "Q4_K_M"]


def test_a_candidate_that_another_beats_in_bytes_and_kld_is_not_on_the_front(trio):
    assert pareto(trio) == ["F16", "threshold-0.2", "threshold-0.4", "Q4_K_M"]
    _, stock, small, large = trio
    assert pareto([stock, with_figures(small, kld=0.05), large]) == ["threshold-0.2", "Q4_K_M"]
    assert pareto([stock, with_figures(small, kld=None), large]) == ["threshold-0.2", "Q4_K_M"]
    twin = with_figures(small, size=stock.bytes, kld=0.05)
    assert set(pareto([stock, twin])) == {"Q4_K_M", "threshold-0.4"}


@pytest.mark.parametrize(
    ("rule", "chosen"),
    [
        (SelectionRule(), "threshold-0.4"),  # 1.08 times Q4_K_M; 1.20 times is too much
        (SelectionRule(max_size_ratio=1.2), "threshold-0.2"),
        (SelectionRule(reference=None), "threshold-0.2"),
        (SelectionRule(reference=None, max_bytes=107_999_999), "Q4_K_M"),
        (SelectionRule(reference=None, max_vram_bytes=158_000_000), "threshold-0.4"),
        (SelectionRule(reference=None, max_bytes=99_000_000), None),
        (SelectionRule(reference="Q5_K_M"), None),  # not among the candidates: nothing can be said to be small enough
    ],
)
def test_the_best_has_the_lowest_kld_within_the_limits(trio, rule, chosen):
    best = choose(trio, rule, WINS)
    assert (best and best.name) == chosen


def test_of_equals_the_smaller_is_chosen_and_full_precision_never(trio):
    full, stock, small, _ = trio
    equal = with_figures(small, kld=0.05)
    assert choose([full, equal, stock], SelectionRule(), WINS) is stock
    assert choose([full], SelectionRule(reference=None)) is None


def test_what_was_not_measured_is_not_chosen(trio):
    full, stock, small, _ = trio
    unknown = with_figures(small, kld=None)
    assert exclusion(unknown, trio, SelectionRule()) == "mean KLD was not measured"
    unknown = with_figures(small, vram=None)
    assert choose([full, stock, unknown], SelectionRule(max_vram_bytes=10**12), WINS) is stock


def test_a_plan_that_does_not_beat_a_mixture_with_confidence_is_not_chosen(trio):
    tie = [against("Q4_K_M", "threshold-0.4", -0.03, 0.05)]
    assert choose(trio, SelectionRule(), tie).name == "Q4_K_M"
    why = "does not beat Q4_K_M with confidence: -1.0 % mean KLD (95 % -5.0 % to +3.0 %)"
    assert exclusion(trio[2], trio, SelectionRule(), tie) == why
    loss = [against("Q4_K_M", "threshold-0.4", -0.5, -0.1)]
    assert choose(trio, SelectionRule(), loss).name == "Q4_K_M"
    assert choose(trio, SelectionRule(), [against("Q4_K_M", "threshold-0.4", 1e-6, 0.05)]).name == "threshold-0.4"


def test_what_was_not_compared_is_not_known_to_be_better(trio):
    assert choose(trio, SelectionRule()).name == "Q4_K_M"
    reason = exclusion(trio[2], trio, SelectionRule(), WINS[1:])
    assert reason == "was not compared with Q4_K_M, which it has to beat"


@pytest.mark.parametrize(
    ("size", "must_beat"),
    [(100_000_000, True), (99_900_100, True), (99_000_000, True), (98_900_000, False)],  # 1 % smaller is of its size
)
def test_only_mixtures_that_are_no_larger_or_of_its_size_must_be_beaten(trio, size, must_beat):
    full, stock, small, _ = trio
    plan = with_figures(small, size=size)
    assert (exclusion(plan, [full, stock, plan], SelectionRule()) is not None) == must_beat


def test_every_mixture_that_is_no_larger_must_be_beaten_and_the_furthest_ahead_is_named(sweep, trio):
    full, stock, small, _ = trio
    smaller = with_figures(sweep.result("Q5_K_M"), size=90_000_000, kld=0.07, vram=140e6)
    comparisons = [against("Q4_K_M", small.name, -0.1, 0.3), against("Q5_K_M", small.name, -0.3, 0.1)]
    results = [full, stock, smaller, small]
    assert "does not beat Q5_K_M" in exclusion(small, results, SelectionRule(), comparisons)
    comparisons[1] = against("Q5_K_M", small.name, 0.1, 0.3)
    assert "does not beat Q4_K_M" in exclusion(small, results, SelectionRule(), comparisons)


def test_a_mixture_that_may_not_be_the_best_itself_need_not_be_beaten(sweep, trio):
    full, stock, small, _ = trio
    barred = with_figures(sweep.result("Q5_K_M"), size=100_000_000, vram=None)
    rule = SelectionRule(max_vram_bytes=160_000_000)
    assert exclusion(small, [full, stock, barred, small], rule, WINS) is None


def budgeted(result, budget, **figures):
    """The result of another budget."""
    parameters = {**result.plan.parameters, "budget": budget}
    plan = result.plan.model_copy(update={"name": f"plan-of-{budget}", "parameters": parameters})
    return with_figures(dataclasses.replace(result, plan=plan), **figures)


def test_a_plan_must_beat_the_mixture_whose_bytes_it_was_given_also_if_that_was_not_measured(trio, sweep):
    full, stock, _, _ = trio
    plan = budgeted(sweep.result("budget-size-of-Q4_K_M"), "size-of:q5_k_m", size=119_000_000, kld=0.01)
    given = with_figures(sweep.result("Q5_K_M"), size=119_000_000, kld=None)
    wins, why = [against("Q4_K_M", plan.name, 0.3, 0.5)], "Q5_K_M, whose bytes it was given, was not measured"
    rule = SelectionRule(reference=None)
    for results in ([full, stock, plan], [full, stock, given, plan]):
        assert exclusion(plan, results, rule, wins) == why
        assert choose(results, rule, wins) is stock
    measured = [full, stock, with_figures(sweep.result("Q5_K_M"), size=119_000_000, kld=0.02), plan]
    assert choose(measured, rule, [*wins, against("Q5_K_M", plan.name, 0.3, 0.5)]) is plan


@pytest.mark.parametrize("budget", ["6.5bpw", "118MB", "vram:200MB@512", None])
def test_a_mixture_without_a_kld_is_not_known_to_be_worse(trio, sweep, budget):
    full, stock, _, large = trio
    plan = budgeted(sweep.result("budget-size-of-Q4_K_M"), budget, size=118_000_000, kld=0.01) if budget else large
    unknown = with_figures(sweep.result("Q5_K_M"), size=110_000_000, kld=None)
    wins, rule = [against("Q4_K_M", plan.name, 0.3, 0.5)], SelectionRule(reference=None)
    assert choose([full, stock, plan], rule, wins) is plan
    assert exclusion(plan, [full, stock, unknown, plan], rule, wins) == (
        "mean KLD of Q5_K_M, which it has to beat, was not measured"
    )
    assert choose([full, stock, unknown, plan], rule, wins) is stock
    larger = with_figures(unknown, size=130_000_000)
    assert choose([full, stock, larger, plan], rule, wins) is plan


def test_a_plan_by_budget_that_nothing_was_measured_to_hold_against_is_not_chosen(trio, sweep):
    full, stock, small, large = trio
    plan = budgeted(sweep.result("budget-size-of-Q4_K_M"), "6.5bpw", size=90_000_000, kld=0.01)
    rule, why = SelectionRule(reference=None), "no stock mixture was measured that it could be held against"
    for results in ([full, plan], [full, with_figures(stock, kld=None), plan]):
        assert exclusion(plan, results, rule) == why
        assert choose(results, rule) is None
    assert choose([full, stock, plan], rule) is plan, "it is smaller than every mixture"
    assert choose([full, small, large], rule) is large, "thresholds do without"


def test_the_rival_is_the_largest_mixture_that_is_no_larger(trio, sweep):
    full, _, small, large = trio
    other = with_figures(sweep.result("Q5_K_M"), size=110_000_000)
    results = [*trio, other]
    rivals = {result.name: rival_of(result, results).name for result in results}
    names = {"threshold-0.4": "Q4_K_M", "threshold-0.2": "Q5_K_M", "F16": "Q5_K_M", "Q4_K_M": "Q4_K_M"}
    assert rivals == {**names, "Q5_K_M": "Q5_K_M"}
    assert rival_of(small, [small, other]) is other, "all are larger"
    assert rival_of(small, [full, small, large]) is None


def test_plans_of_a_mixtures_size_are_no_larger_and_hardly_smaller(trio):
    stock, plan = trio[1], trio[2]
    sizes = (100_200_000, 100_090_000, 99_100_000, 98_900_000)
    plans = [with_figures(plan, size=size) for size in sizes]
    assert [one.bytes for one in of_its_size(stock, [stock, *plans])] == [100_090_000, 99_100_000]


def test_a_plan_that_leaves_its_budget_idle_still_has_to_beat_the_mixture_it_was_budgeted_by(trio, sweep):
    full, stock, _, _ = trio
    smaller = with_figures(sweep.result("Q5_K_M"), size=80_000_000, kld=0.2)
    plan = with_figures(sweep.result("budget-size-of-Q4_K_M"), size=95_000_000, kld=0.0499)
    results = [full, stock, smaller, plan]
    assert rival_of(plan, results) is stock
    beats_the_smaller = against("Q5_K_M", plan.name, 0.6, 0.8)
    tie = [beats_the_smaller, against("Q4_K_M", plan.name, -0.05, 0.05)]
    assert exclusion(plan, results, SelectionRule(), tie).startswith("does not beat Q4_K_M with confidence")
    assert choose(results, SelectionRule(), tie) is stock
    assert choose(results, SelectionRule(), [beats_the_smaller, against("Q4_K_M", plan.name, 0.01, 0.05)]) is plan


def test_a_rule_can_be_read_aloud():
    rule = SelectionRule(max_size_ratio=1.1, max_vram_bytes=76_000_000_000)
    expected = "quantized candidates no larger than 1.1 times Q4_K_M and within 76000.0 MB of predicted VRAM"
    assert describe_rule(rule) == expected
    assert describe_rule(SelectionRule(reference=None)) == "quantized candidates"
