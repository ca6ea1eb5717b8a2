import dataclasses

import pytest

from samq.records import Metric
from samq.selection import KLD, VRAM, SelectionRule, by_size, choose, describe_rule, exclusion, pareto


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
    best = choose(trio, rule)
    assert (best and best.name) == chosen


def test_of_equals_the_smaller_is_chosen_and_full_precision_never(trio):
    full, stock, small, _ = trio
    equal = with_figures(small, kld=0.05)
    assert choose([full, equal, stock], SelectionRule()) is stock
    assert choose([full], SelectionRule(reference=None)) is None


def test_what_was_not_measured_is_not_chosen(trio):
    full, stock, small, _ = trio
    unknown = with_figures(small, kld=None)
    assert exclusion(unknown, trio, SelectionRule()) == "mean KLD was not measured"
    unknown = with_figures(small, vram=None)
    assert choose([full, stock, unknown], SelectionRule(max_vram_bytes=10**12)) is stock


def test_a_rule_can_be_read_aloud():
    rule = SelectionRule(max_size_ratio=1.1, max_vram_bytes=76_000_000_000)
    expected = "quantized candidates no larger than 1.1 times Q4_K_M and within 76000.0 MB of predicted VRAM"
    assert describe_rule(rule) == expected
    assert describe_rule(SelectionRule(reference=None)) == "quantized candidates"
