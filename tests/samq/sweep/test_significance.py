import math

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom, norm, ttest_rel

from samq.errors import SamqError
from samq.sweep.significance import (
    PairedComparison,
    compare_items,
    compare_values,
    delta_metrics,
    items_needed,
    mcnemar_p,
    tango_limit,
)


def paired(better, worse, same):
    """Values of candidate and reference on items of which some are better, some worse, and half of the rest right."""
    ours = [1.0] * better + [0.0] * worse + [1.0, 0.0] * (same // 2)
    theirs = [0.0] * better + [1.0] * worse + [1.0, 0.0] * (same // 2)
    return np.array(ours), np.array(theirs)


def draw(random, items, better, worse):
    """Differences of `items` items that are better or worse with the probabilities given."""
    return random.choice([1.0, -1.0, 0.0], items, p=[better, worse, 1 - better - worse])


def test_a_comparison_has_both_values_their_difference_and_its_paired_error():
    ours, theirs = paired(better=3, worse=9, same=88)
    comparison = compare_values(ours, theirs)
    assert (comparison.items, comparison.value, comparison.reference_value) == (100, 0.47, 0.53)
    assert comparison.difference == pytest.approx(-0.06)
    assert comparison.stderr == pytest.approx((ours - theirs).std(ddof=1) / 10)
    assert comparison.low < -0.06 < comparison.high and comparison.margin == pytest.approx(0.0053)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (0, 5), (3, 9), (40, 41)])
def test_mcnemars_p_is_the_binomial_probability_of_what_is_no_likelier(better, worse):
    differ = better + worse
    at_most = binom.pmf(min(better, worse), differ, 0.5) * (1 + 1e-12)
    expected = sum(p for p in binom.pmf(range(differ + 1), differ, 0.5) if p <= at_most)
    assert mcnemar_p(better, worse) == pytest.approx(expected)


def test_mcnemars_p_is_below_five_percent_no_more_often_than_that():
    random, rejected = np.random.default_rng(0), 0
    for _ in range(500):
        drawn = draw(random, 200, 0.1, 0.1)
        rejected += mcnemar_p(int((drawn > 0).sum()), int((drawn < 0).sum())) < 0.05
    assert rejected / 500 <= 0.06


@pytest.mark.parametrize(("better", "worse", "items"), [(12, 2, 50), (1, 0, 44), (0, 7, 30), (5, 5, 40), (0, 0, 25)])
@pytest.mark.parametrize("side", [-1, 1])
def test_tangos_limit_is_where_the_score_test_just_rejects(better, worse, items, side):
    limit = tango_limit(np.array([1.0] * better + [-1.0] * worse + [0.0] * (items - better - worse)), 0.975, side)

    def log_likelihood(p):
        parts = ((better, p + limit), (worse, p), (items - better - worse, 1 - 2 * p - limit))
        return sum(count * math.log(chance) for count, chance in parts if count)

    bounds = max(0.0, -limit) + 1e-12, (1 - limit) / 2 - 1e-12
    likeliest = minimize_scalar(
        lambda p: -log_likelihood(p), bounds=bounds, method="bounded", options={"xatol": 1e-10}
    ).x
    variance = items * (2 * likeliest + limit - limit**2)
    assert abs(better - worse - items * limit) / math.sqrt(variance) == pytest.approx(norm.ppf(0.975), rel=1e-3)


def test_an_interval_without_a_differing_item_is_not_empty():
    none_differs = np.zeros(100)
    z = norm.ppf(0.95)
    assert tango_limit(none_differs, 0.95, -1) == pytest.approx(-(z**2) / (100 + z**2))
    assert tango_limit(np.ones(9), 0.95, 1) == 1 and 0 < tango_limit(np.ones(9), 0.95, -1) < 1
    assert tango_limit(-np.ones(9), 0.95, -1) == -1


@pytest.mark.parametrize(("items", "better", "worse"), [(100, 0.05, 0.05), (100, 0.01, 0.02), (400, 0.1, 0.14)])
def test_of_100_intervals_about_95_hold_the_truth(items, better, worse):
    random, hits = np.random.default_rng(0), 0
    for _ in range(600):
        drawn = draw(random, items, better, worse)
        hits += tango_limit(drawn, 0.975, -1) <= better - worse <= tango_limit(drawn, 0.975, 1)
    assert 0.93 <= hits / 600 <= 0.995


def test_a_candidate_at_the_margin_is_called_non_inferior_at_most_five_times_in_100():
    random, called, margin = np.random.default_rng(0), 0, 0.05
    theirs = np.array([1.0, 0.0] * 150)
    for _ in range(400):  # a loss of 2.5 points of 50 % is 5 % relative
        chance = np.where(theirs == 1, 0.10, 0.05)
        ours = np.where(random.random(300) < chance, 1 - theirs, theirs)
        called += compare_values(ours, theirs, margin=margin).verdict == "non-inferior"
    assert called / 400 <= 0.07


def test_the_verdicts_follow_from_the_interval_and_the_margin():
    assert compare_values(*paired(0, 0, 100)).verdict == "undecided", "too few items to rule out a loss of 1 %"
    assert compare_values(*paired(0, 0, 1000)).verdict == "non-inferior"
    assert compare_values(*paired(30, 0, 200)).verdict == "non-inferior"
    assert compare_values(*paired(0, 30, 200)).verdict == "inferior"
    assert compare_values(*paired(4, 8, 200)).verdict == "undecided"
    assert compare_values(*paired(4, 8, 200), margin=0.2).verdict == "non-inferior"


def test_where_lower_is_better_a_rise_is_a_loss():
    ours, theirs = paired(30, 0, 200)
    comparison = compare_values(ours, theirs, higher_is_better=False)
    assert comparison.difference > 0 and comparison.verdict == "inferior" and comparison.least < -comparison.difference
    assert compare_values(theirs, ours, higher_is_better=False).verdict == "non-inferior"
    spread = np.random.default_rng(0).normal(2, 0.1, 200)
    assert compare_values(spread + 1, spread, higher_is_better=False).verdict == "inferior"
    assert compare_values(spread, spread + 1, higher_is_better=False).verdict == "non-inferior"


def test_other_metrics_get_a_bootstrap_that_agrees_with_the_t_test():
    random = np.random.default_rng(0)
    hard = random.normal(0, 1, 400)
    ours, theirs = hard + random.normal(0.03, 0.2, 400), hard + random.normal(0, 0.2, 400)
    comparison, expected = compare_values(ours, theirs), ttest_rel(ours, theirs)
    assert comparison.test == "bootstrap" and comparison.p == pytest.approx(expected.pvalue, abs=0.02)
    interval = expected.confidence_interval(0.95)
    assert (comparison.low, comparison.high) == pytest.approx((interval.low, interval.high), abs=0.003)
    assert comparison.low <= interval.low + 1e-12 and comparison.high >= interval.high - 1e-12, "never narrower"
    assert comparison == compare_values(ours, theirs), "the same for the same seed"


def test_of_100_intervals_of_other_metrics_about_95_hold_the_truth():
    random, hits = np.random.default_rng(0), 0
    for _ in range(150):
        drawn = random.exponential(1, 30)
        comparison = compare_values(drawn, np.full(30, 0.5))
        hits += comparison.low <= 0.5 <= comparison.high
    assert hits / 150 >= 0.90


def test_a_single_item_decides_nothing(tmp_path):
    comparison = compare_values(np.array([0.3]), np.array([0.4]))
    assert (comparison.verdict, comparison.stderr, comparison.low, comparison.least) == ("undecided", None, None, None)
    assert PairedComparison.load(comparison.save(tmp_path / "comparison.json")) == comparison
    assert compare_values(np.array([1.0]), np.array([1.0])).verdict == "undecided"


def test_with_the_items_said_to_be_needed_four_of_five_trials_decide():
    random = np.random.default_rng(0)
    gains = np.array([1.0] * 6 + [-1.0] * 4 + [0.0] * 190)
    needed = items_needed(gains, 0.02)
    decided = sum(tango_limit(draw(random, needed, 0.03, 0.02), 0.95, -1) > -0.02 for _ in range(300))
    assert 0.72 <= decided / 300 <= 0.9


def test_no_number_of_items_tells_what_lies_on_the_margin():
    assert items_needed(np.array([-1.0] + [0.0] * 99), 0.01) is None
    assert items_needed(np.zeros(100), 0.01) == 268
    assert items_needed(np.zeros(100), 0.0) is None


def test_few_equal_items_are_no_proof_whatever_the_metric_is():
    shares = np.linspace(0.2, 0.9, 20)  # such as F1
    comparison = compare_values(shares, shares)
    assert comparison.verdict == "undecided" and comparison.p == 1 and comparison.low < 0 < comparison.high
    assert comparison.items_needed > 200
    many = np.resize(shares, comparison.items_needed)
    assert compare_values(many, many).verdict == "non-inferior"
    binary = compare_values(np.ones(50), np.ones(50))
    almost = compare_values(np.r_[np.ones(49), 0.5], np.r_[np.ones(49), 0.5])  # not binary, of the same range
    assert almost.least == pytest.approx(binary.least) and almost.low == pytest.approx(binary.low)


def items_of(values, benchmark="gsm8k", metric="exact_match", document="d"):
    rows = [
        {"benchmark": benchmark, "task": benchmark, "item": item, "document": f"{document}{item}", "metric": metric}
        | {"value": value, "higher_is_better": True, "answer": ""}
        for item, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def test_tables_are_compared_item_by_item_whatever_their_order():
    ours, theirs = items_of([1, 0, 1, 1.0]), items_of([1, 1, 0, 1.0])
    only_ours = items_of([1.0], benchmark="mmlu")
    (comparison,) = compare_items("q4", pd.concat([ours, only_ours]), "F16", theirs[::-1])
    assert (comparison.benchmark, comparison.metric, comparison.candidate, comparison.reference) == (
        "gsm8k",
        "exact_match",
        "q4",
        "F16",
    )
    assert comparison.difference == 0 and comparison.items == 4 and comparison.p == 1
    metrics = delta_metrics([comparison], "f16")
    assert metrics["eval/gsm8k/exact_match_delta_vs_f16"].stderr == comparison.stderr
    assert metrics["eval/gsm8k/exact_match_p_vs_f16"].value == 1


def test_item_numbers_may_be_text_and_an_item_counts_once():
    ours, theirs = items_of([1, 0, 1, 1.0] * 3), items_of([1, 1, 0, 1.0] * 3)
    (expected,) = compare_items("q4", ours, "F16", theirs)
    (comparison,) = compare_items(
        "q4", pd.concat([ours, ours]), "F16", theirs.astype({"item": str}).astype({"item": object})
    )
    assert comparison == expected and comparison.items == 12


def test_the_verdict_is_a_metric():
    (comparison,) = compare_items("q4", items_of([1.0] * 400), "F16", items_of([1.0] * 400))
    assert delta_metrics([comparison], "f16")["eval/gsm8k/exact_match_non_inferior_vs_f16"].value == 1


def test_other_items_are_refused():
    with pytest.raises(SamqError, match=r"^q4 and F16 were not asked the same items of gsm8k; evaluate both"):
        compare_items("q4", items_of([1, 0.0]), "F16", items_of([1, 0.0], document="other"))
    with pytest.raises(SamqError, match="not asked the same items"):
        compare_items("q4", items_of([1, 0.0]), "F16", items_of([1.0]))
