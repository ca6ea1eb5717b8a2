"""Whether a candidate does worse on a benchmark than a reference, on the same items.

All is paired: what makes an item hard is hard for both, and cancels. For metrics that are 0 or 1 for an item, only items on
which the two differ count. The p value is McNemar's exact one. The interval of the difference is Tango's score interval
(Statistics in Medicine 17, 1998), which stays honest when few items differ, or none. Other metrics get a paired bootstrap. Their
interval is the wider, at each end, of its percentile interval and Student's t. If no item differs, that would have no width. The
interval is then as wide as Tango's, in the range of the values.

Non-inferior means, with 95 % confidence, at most a margin worse than the reference. The default margin is one per cent of the
reference's value. It is not enough that two do not differ significantly, and few items never suffice. With no item on which the
two differ, it takes 268 items to rule out a loss of one per cent of all.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import brentq
from scipy.stats import binomtest, bootstrap, norm
from scipy.stats import t as student

from samq.errors import SamqError
from samq.records import Metric, Record
from samq.sweep.comparison import CONFIDENCE, RESAMPLES

JSON_ITEMS = "json/valid"  # the JSON prompts' answers among the items: every evaluation may have them
MARGIN = 0.01  # at most 1 % worse than the reference
_POWER = 0.8  # chance to decide with the items that are said to be needed, the usual one
_BATCH = 100  # resamples in memory at once: 8 MB for 10,000 items
_ITEM = ["task", "item", "document"]

Verdict = Literal["non-inferior", "inferior", "undecided"]
_VERDICTS: dict[Verdict, float] = {"non-inferior": 1.0, "undecided": 0.0, "inferior": -1.0}


class PairedComparison(Record):
    """A candidate's results on a benchmark's items against a reference's."""

    SCHEMA: ClassVar[str] = "samq.paired-comparison/1"

    benchmark: str
    metric: str
    candidate: str
    reference: str
    items: int
    value: float = Field(description="the candidate's mean over the items")
    reference_value: float
    difference: float = Field(description="candidate - reference")
    stderr: float | None = Field(description="of the difference, paired; None for a single item")
    low: float | None = Field(
        description="lower end of the difference's 95 % confidence interval; None: one item has no such end"
    )
    high: float | None
    p: float = Field(description="two-sided p value of no difference: McNemar's exact test, or a paired bootstrap")
    test: Literal["McNemar", "bootstrap"]
    higher_is_better: bool
    margin: float = Field(description="largest loss that counts as none, in the metric's unit")
    least: float | None = Field(
        description="the difference at its worst, 95 % one-sided; in the metric's direction of better"
    )
    verdict: Verdict = Field(
        description="non-inferior: the whole one-sided 95 % interval is within the margin; inferior: all of it beyond"
    )
    items_needed: int | None = Field(
        description="items for a decision with a chance of 80 % if the differences stay as they are; None: no number would do"
    )

    @property
    def metric_name(self) -> str:
        """The metric's name in an evaluation."""
        name = f"{self.benchmark}/{self.metric}"
        return name if name == JSON_ITEMS else f"eval/{name}"


def compare_items(
    candidate: str,
    ours: pd.DataFrame,
    reference: str,
    theirs: pd.DataFrame,
    *,
    margin: float = MARGIN,
    seed: int = 0,
) -> list[PairedComparison]:
    """Compare two candidates by their tables of items, one comparison for each benchmark and metric.

    `margin` is relative to the reference's value. What only one of the two was asked is left out. Deterministic for a seed.
    Raises SamqError if the two were asked other items of the same benchmark.
    """
    theirs_by = {key: table for key, table in theirs.groupby(["benchmark", "metric"], sort=False)}
    comparisons = []
    for (benchmark, metric), mine in ours.groupby(["benchmark", "metric"], sort=False):
        other = theirs_by.get((benchmark, metric))
        if other is None:
            continue
        mine, other = _in_order(mine), _in_order(other)
        if not mine[_ITEM].equals(other[_ITEM]):
            raise SamqError(
                f"{candidate} and {reference} were not asked the same items of {benchmark}; evaluate both with the same "
                "settings"
            )
        comparisons.append(
            compare_values(
                mine["value"].to_numpy(),
                other["value"].to_numpy(),
                names=(str(benchmark), str(metric), candidate, reference),
                higher_is_better=bool(mine["higher_is_better"].iloc[0]),
                margin=margin,
                seed=seed,
            )
        )
    return comparisons


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    """One benchmark's rows, sorted, each item once: a tag and a task of it may both have been asked for.

    Item numbers become text, as which a table of several benchmarks may hold them.
    """
    rows = table.assign(item=table["item"].astype(str)).drop_duplicates(_ITEM)
    return rows.sort_values(_ITEM).reset_index(drop=True)


def compare_values(
    ours: NDArray[np.float64],
    theirs: NDArray[np.float64],
    *,
    names: tuple[str, str, str, str] = ("benchmark", "metric", "candidate", "reference"),
    higher_is_better: bool = True,
    margin: float = MARGIN,
    seed: int = 0,
) -> PairedComparison:
    """Compare the values of two on the same items, in the same order; `names` as in PairedComparison's first fields."""
    differences = ours - theirs
    count = len(differences)
    binary = bool(np.isin(ours, (0, 1)).all() and np.isin(theirs, (0, 1)).all())
    allowed = margin * abs(float(theirs.mean()))
    gains = differences if higher_is_better else -differences
    stderr = float(differences.std(ddof=1) / math.sqrt(count)) if count > 1 else None
    two_sided, one_sided = (1 + CONFIDENCE) / 2, CONFIDENCE
    if binary:
        low, high = (tango_limit(differences, two_sided, side) for side in (-1, 1))
        worst, best = (tango_limit(gains, one_sided, side) for side in (-1, 1))
        p = mcnemar_p(int((differences > 0).sum()), int((differences < 0).sum()))
    else:
        means = _resampled_means(differences, seed)
        reach = _range(ours, theirs)
        low, high = _limits(differences, means, two_sided, reach)
        worst, best = _limits(differences, means, one_sided, reach)
        if not higher_is_better:
            worst, best = -best, -worst
        p = _bootstrap_p(float(differences.mean()), means)
    verdict: Verdict = "non-inferior" if worst > -allowed else "inferior" if best < -allowed else "undecided"
    benchmark, metric, candidate, reference = names
    return PairedComparison(
        benchmark=benchmark,
        metric=metric,
        candidate=candidate,
        reference=reference,
        items=count,
        value=float(ours.mean()),
        reference_value=float(theirs.mean()),
        difference=float(differences.mean()),
        stderr=stderr,
        low=_finite(low),
        high=_finite(high),
        p=p,
        test="McNemar" if binary else "bootstrap",
        higher_is_better=higher_is_better,
        margin=allowed,
        least=_finite(worst),
        verdict=verdict,
        items_needed=items_needed(gains, allowed, 1.0 if binary else reach),
    )


def _finite(end: float) -> float | None:
    return end if math.isfinite(end) else None


def delta_metrics(comparisons: Sequence[PairedComparison], against: str) -> dict[str, Metric]:
    """The differences as metrics: `eval/gsm8k/exact_match_delta_vs_f16`, its p value `..._p_vs_f16`, and the verdict.

    `..._non_inferior_vs_f16` is 1 for non-inferior, -1 for inferior and 0 while undecided.
    """
    metrics: dict[str, Metric] = {}
    for one in comparisons:
        metrics[f"{one.metric_name}_delta_vs_{against}"] = Metric(value=one.difference, stderr=one.stderr, n=one.items)
        metrics[f"{one.metric_name}_p_vs_{against}"] = Metric(value=one.p, n=one.items)
        metrics[f"{one.metric_name}_non_inferior_vs_{against}"] = Metric(value=_VERDICTS[one.verdict], n=one.items)
    return metrics


def mcnemar_p(better: int, worse: int) -> float:
    """Exact two-sided p value that a differing item is as likely better as worse (McNemar 1947); 1 if none differs."""
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def tango_limit(differences: NDArray[np.float64], confidence: float, side: Literal[-1, 1]) -> float:
    """One end of Tango's score interval of a mean of paired 0/1 differences, which are -1, 0 or 1.

    `confidence` is one-sided. The end is the difference d at which the score test of "the true difference is d" just
    rejects. Its standard error is taken at d, not at what was observed, so it is never zero.
    """
    count = len(differences)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    critical = norm.ppf(confidence)

    def excess(d: float) -> float:
        """How far the score test at d is from just rejecting."""
        # the maximum-likelihood estimate, given d, of the probability that an item is worse: Tango 1998, equation 4
        b = -better - worse + (2 * count - better + worse) * d
        likeliest = (math.sqrt(max(b * b + 8 * count * worse * d * (1 - d), 0.0)) - b) / (4 * count)
        variance = count * max(2 * likeliest + d * (1 - d), 0.0)
        return float((better - worse - count * d) + side * critical * math.sqrt(variance))

    observed = (better - worse) / count
    if observed == side:
        return float(side)
    beside = observed + side * 1e-9  # at what was observed the variance may be 0, which the score test never rejects
    return float(brentq(excess, *sorted((beside, float(side))), xtol=1e-12))


def _resampled_means(differences: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """The means of as many bootstrap resamples as RESAMPLES says; of a single item all are its own."""
    if len(differences) == 1:
        return np.repeat(differences, RESAMPLES)
    resampled = bootstrap(
        (differences,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=_BATCH,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return np.asarray(resampled.bootstrap_distribution)


def _range(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    """How far apart an item's two values can be, as far as the values tell; 0 counts as one of them."""
    values = np.concatenate([ours, theirs, [0.0]])
    return float(values.max() - values.min())


def _limits(
    differences: NDArray[np.float64], means: NDArray[np.float64], confidence: float, reach: float
) -> tuple[float, float]:
    """The wider, at each end, of the bootstrap's percentiles and Student's t; `confidence` is one-sided.

    Where no item differs, as many may as Tango's interval allows then, each by `reach`.
    """
    count, centre = len(differences), float(differences.mean())
    if count == 1:
        return -math.inf, math.inf
    if not differences.any():
        return reach * tango_limit(differences, confidence, -1), reach * tango_limit(differences, confidence, 1)
    half = float(student.ppf(confidence, count - 1) * differences.std(ddof=1) / math.sqrt(count))
    low, high = np.quantile(means, [1 - confidence, confidence])
    return min(float(low), centre - half), max(float(high), centre + half)


def _bootstrap_p(difference: float, means: NDArray[np.float64]) -> float:
    """How often resamples differ from their centre by as much as that differs from none (Efron and Tibshirani 1993)."""
    as_far = np.abs(means - difference) >= abs(difference)
    return float((as_far.sum() + 1) / (len(means) + 1))


def items_needed(gains: NDArray[np.float64], margin: float, reach: float = 1.0) -> int | None:
    """Items with which the verdict is decided with a chance of 80 %, if mean and spread of the gains stay as they are.

    n = ((z of the confidence + z of the power) * spread / distance of the mean from the margin)^2

    This is the usual sample size of a non-inferiority trial. The result is at least what rules out the margin when no item
    differs, of metrics that differ by 0 or `reach`. None if the mean lies on the margin, or the margin is 0 and no item differs.
    """
    distance = abs(float(gains.mean()) + margin)
    spread = float(gains.std())
    if distance == 0:
        return None
    z = float(norm.ppf(CONFIDENCE))
    needed = ((z + float(norm.ppf(_POWER))) * spread / distance) ** 2
    if 0 < margin < reach and np.isin(gains, (-reach, 0, reach)).all():
        needed = max(needed, z * z * (reach / margin - 1))
    return math.ceil(needed)
