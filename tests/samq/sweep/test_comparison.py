import dataclasses
import math

import numpy as np
import pandas as pd
import pytest

from samq.errors import SamqError
from samq.files import DIVERGENCE_NAME
from samq.sweep.comparison import compare, compare_sweep
from samq.sweep.selection import Comparison


def tokens(kld):
    """A table of scored tokens from KLDs shaped (chunks, tokens)."""
    chunks, scored = kld.shape
    places = {
        "chunk": np.repeat(np.arange(chunks, dtype=np.int32), scored),
        "position": np.tile(np.arange(scored, dtype=np.int32), chunks),
        "token": np.arange(chunks * scored, dtype=np.int32),
    }
    return pd.DataFrame({**places, "kld": kld.ravel()})


def pair(random, chunks, reduction, spread=0.5, noise=0.3):
    """Two tables whose chunks have a hardness in common and a noise each; the reduction is that of the expectations."""
    hard = random.lognormal(0, spread, (chunks, 1))
    ours, theirs = (hard * random.lognormal(0, noise, (chunks, 1)) * np.ones(4) for _ in range(2))
    return tokens((1 - reduction) * ours), tokens(theirs)


def test_the_reduction_is_that_of_the_means():
    comparison = compare("a", tokens(np.array([[1.0, 2], [3, 4]])), "b", tokens(np.array([[2.0, 4], [6, 8]])))
    assert (comparison.candidate, comparison.rival) == ("a", "b")
    assert comparison.reduction == comparison.low == comparison.high == pytest.approx(0.5), "all chunks agree"
    assert comparison.verdict == "win"


@pytest.mark.slow  # thousands of intervals
@pytest.mark.parametrize("chunks", [3, 12, 40])
@pytest.mark.parametrize("noise", [0.2, 0.8])
def test_of_100_intervals_about_95_hold_the_truth(chunks, noise):
    random, hits = np.random.default_rng(0), 0
    for _ in range(300):
        ours, theirs = pair(random, chunks, 0.2, noise=noise)
        comparison = compare("a", ours, "b", theirs)
        hits += comparison.low <= 0.2 <= comparison.high
    assert 0.90 <= hits / 300 <= 0.98


def test_the_bootstrap_alone_would_be_too_narrow_for_few_chunks():
    random, hits = np.random.default_rng(0), 0
    for _ in range(300):
        sums = np.stack([table.groupby("chunk")["kld"].sum() for table in pair(random, 5, 0.2)])
        resampled = sums[:, random.integers(0, 5, (500, 5))].sum(axis=2)
        low, high = np.quantile(1 - resampled[0] / resampled[1], [0.025, 0.975])
        hits += low <= 0.2 <= high
    assert hits / 300 < 0.88, "if this no longer holds, the wider interval is not needed"


def test_pairing_cancels_what_makes_text_hard():
    random = np.random.default_rng(0)
    ours, theirs = pair(random, 12, 0.1, spread=2.0)
    paired = compare("a", ours, "b", theirs)
    shuffled = theirs.assign(kld=theirs["kld"].to_numpy().reshape(12, 4)[::-1].ravel())
    unpaired = compare("a", ours, "b", shuffled)
    assert paired.high - paired.low < 0.3 * (unpaired.high - unpaired.low)


def test_alike_tokens_of_a_chunk_make_no_interval_narrower():
    random = np.random.default_rng(0)
    ours, theirs = (random.lognormal(0, 0.5, (12, 1)) for _ in range(2))
    few = compare("a", tokens(ours), "b", tokens(theirs))
    many = compare("a", tokens(np.tile(ours, 100)), "b", tokens(np.tile(theirs, 100)))
    assert (many.low, many.high) == pytest.approx((few.low, few.high))


def test_the_same_seed_gives_the_same_interval():
    ours, theirs = pair(np.random.default_rng(0), 64, 0.2, noise=1.0)  # skewed: the bootstrap is the wider at one end
    assert compare("a", ours, "b", theirs, seed=3) == compare("a", ours, "b", theirs, seed=3)
    assert compare("a", ours, "b", theirs, seed=3) != compare("a", ours, "b", theirs, seed=4)


def test_who_is_compared_with_whom_changes_the_sign_only():
    ours, theirs = pair(np.random.default_rng(0), 12, 0.5)
    one, other = compare("a", ours, "b", theirs), compare("b", theirs, "a", ours)
    assert (one.verdict, other.verdict) == ("win", "loss")
    assert (1 - one.low) * (1 - other.high) == pytest.approx(1)


def test_one_chunk_tells_nothing_of_how_chunks_differ():
    comparison = compare("a", tokens(np.array([[1.0, 1]])), "b", tokens(np.array([[2.0, 2]])))
    assert (comparison.low, comparison.reduction, comparison.high) == (-math.inf, 0.5, 1.0)
    assert comparison.verdict == "tie"
    assert comparison.in_words == "-50.0 % mean KLD (too little text for an interval)"


def test_the_same_tokens_are_a_tie_and_full_precision_is_beyond_compare():
    ours, _ = pair(np.random.default_rng(0), 6, 0.2)
    exact = ours.assign(kld=0.0)
    assert compare("a", ours, "b", ours.copy()) == Comparison("a", "b", 0.0, 0.0, 0.0)
    assert compare("a", exact, "b", exact).verdict == "tie"
    assert compare("a", exact, "b", ours) == Comparison("a", "b", 1.0, 1.0, 1.0)
    lost = compare("a", ours, "b", exact)
    assert lost.verdict == "loss"
    assert lost.in_words == "over +1000 % mean KLD (95 % over +1000 % to over +1000 %)"


@pytest.mark.parametrize("change", ["token", "order", "count"])
def test_tables_of_other_tokens_are_refused(change):
    ours, theirs = pair(np.random.default_rng(0), 6, 0.2)
    if change == "token":
        theirs.loc[3, "token"] += 1
    theirs = {"token": theirs, "order": theirs[::-1], "count": theirs[:-1]}[change]
    with pytest.raises(SamqError, match="a and b were not measured on the same held-out tokens"):
        compare("a", ours, "b", theirs)


def test_every_candidate_of_a_sweep_is_compared_with_every_mixture(sweep):
    compared = {(one.candidate, one.rival): one for one in compare_sweep(sweep.results)}
    plans = ("threshold-0.4", "threshold-0.2", "budget-size-of-Q4_K_M", "budget-size-of-Q5_K_M")
    assert set(compared) == {(plan, mixture) for plan in plans for mixture in ("Q4_K_M", "Q5_K_M")}
    one = compared["budget-size-of-Q4_K_M", "Q4_K_M"]
    ratio = sweep.result(one.candidate).kld.value / sweep.result(one.rival).kld.value
    assert one.reduction == pytest.approx(1 - ratio)
    assert one.low < one.reduction < one.high


def test_a_sweep_without_mixtures_has_no_comparisons(sweep):
    assert compare_sweep([result for result in sweep.results if result.plan.policy != "stock"]) == []


def test_a_missing_table_names_the_candidate(sweep):
    (sweep.result("threshold-0.2").folder / DIVERGENCE_NAME).unlink()
    with pytest.raises(SamqError, match=r"threshold-0\.2 has no scored tokens"):
        compare_sweep(sweep.results)


def test_a_candidate_whose_fidelity_was_not_measured_is_left_out(sweep):
    results = [r for r in sweep.results if r.name != "threshold-0.2"]
    bare = sweep.result("threshold-0.2")
    bare = dataclasses.replace(bare, evaluation=bare.evaluation.model_copy(update={"metrics": {}}))
    assert {one.candidate for one in compare_sweep([*results, bare])} == {
        *("threshold-0.4", "budget-size-of-Q4_K_M", "budget-size-of-Q5_K_M")
    }
