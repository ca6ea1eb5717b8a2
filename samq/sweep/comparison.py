"""Whether one candidate is closer to full precision than another, on the same held-out tokens.

Compared is the relative reduction of mean KLD, 1 - mean KLD of the candidate / mean KLD of the rival. Its confidence
interval is paired: what makes a token hard is hard for both, and cancels. It is over whole chunks of text, not tokens:
the tokens of a chunk share their text, so they are fewer observations than they seem.

SAMQ computes two intervals for the logarithm of the ratio of means, and takes the wider at each end. One is the percentile
bootstrap, the other Student's t with the ratio's linearised standard error. With few chunks the bootstrap alone is too narrow,
as a resample cannot spread more than the few chunks did. Of its 95 % intervals, 90 % hold the truth at 12 chunks and 76 % at 3.
Student's t allows for that, and falls short itself where a chunk dominates the mean. In simulations the wider of both holds the
truth in 92 to 95 % at 12 chunks, and in 91 to 94 % at 3. tests/samq/sweep/test_comparison.py requires 90 to 98 %.
"""

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import bootstrap
from scipy.stats import t as student

from samq.errors import SamqError
from samq.files import DIVERGENCE_NAME
from samq.sweep.selection import Comparison, Result, stock

CONFIDENCE = 0.95
RESAMPLES = 2000
_TOKENS = ["chunk", "position", "token"]


def compare(candidate: str, ours: pd.DataFrame, rival: str, theirs: pd.DataFrame, *, seed: int = 0) -> Comparison:
    """Compare two candidates by their tables of scored tokens (columns chunk, position, token, kld; a row each).

    Deterministic for a seed. A single chunk tells nothing of how chunks differ: the interval then is without bounds.
    Raises SamqError if the tables are not of the same tokens in the same order.
    """
    if not ours[_TOKENS].reset_index(drop=True).equals(theirs[_TOKENS].reset_index(drop=True)):
        raise SamqError(
            f"{candidate} and {rival} were not measured on the same held-out tokens; evaluate both on the same text"
        )
    sums = np.stack([table.groupby("chunk")["kld"].sum().to_numpy() for table in (ours, theirs)])
    total, rival_total = sums.sum(axis=1)
    if np.array_equal(sums[0], sums[1]):  # the same file, or two exact ones
        return Comparison(candidate, rival, 0.0, 0.0, 0.0)
    if min(total, rival_total) <= 0:  # one of the two is full precision itself
        reduction = 1.0 if total <= 0 else -math.inf
        return Comparison(candidate, rival, reduction, reduction, reduction)
    low, high = _interval(sums, seed)
    return Comparison(candidate, rival, 1 - float(total / rival_total), -math.expm1(high), -math.expm1(low))


def _interval(sums: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """Confidence interval of the log ratio of the two means; `sums` is (2, chunks), both positive."""
    chunks = sums.shape[1]
    if chunks == 1:
        return -math.inf, math.inf
    tail = (1 - CONFIDENCE) / 2
    low, high = bootstrap(
        tuple(sums),
        _log_ratio,
        n_resamples=RESAMPLES,
        vectorized=True,
        paired=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    means = sums.mean(axis=1, keepdims=True)
    ours, theirs = sums / means
    half = student.ppf(1 - tail, chunks - 1) * (ours - theirs).std(ddof=1) / math.sqrt(chunks)
    centre = math.log(means[0, 0] / means[1, 0])
    return min(float(low), centre - half), max(float(high), centre + half)


def _log_ratio(ours: NDArray[np.float64], theirs: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = np.log(ours.sum(axis=axis) / theirs.sum(axis=axis))
    return ratio


def compare_sweep(results: Sequence[Result], *, seed: int = 0) -> list[Comparison]:
    """Every quantized candidate against every stock mixture of the sweep, from the tables beside their evaluations.

    Raises SamqError if a table is missing, or is of other tokens than the rest.
    """
    measured = [result for result in results if result.plan.policy != "full" and result.kld]
    rivals = stock(measured)
    tables = {result.name: read_tokens(result) for result in measured} if rivals else {}
    others = [result for result in measured if result.plan.policy != "stock"]
    return [
        compare(ours.name, tables[ours.name], theirs.name, tables[theirs.name], seed=seed)
        for ours, theirs in product(others, rivals)
    ]


def read_tokens(result: Result) -> pd.DataFrame:
    """The scored tokens of a candidate: chunk, position, token and KLD."""
    path = result.folder / DIVERGENCE_NAME
    if not path.is_file():
        raise SamqError(f"{result.name} has no scored tokens: there is no {path}; evaluate it again")
    return pd.read_parquet(path, columns=[*_TOKENS, "kld"])
