"""Which rows of a tensor are rounded to price it: all, or of a large tensor a sample.

Rounding a 70B model to seven types takes a processor more than an hour. A price is a sum over rows of the row's Fisher mean
times its weighted squared error, and the Fisher means are known. So rows are drawn with probabilities proportional to them
(Hansen and Hurwitz 1943), one from each of equal parts of their sum. The price is then the sum of all Fisher means times the
mean error of the drawn rows. Only the differences between rows' errors are left to chance (benchmarks/price_samples.py).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from samq.gguf.file import TensorInfo
from samq.sensitivity.fisher import Fisher

# A tensor of more weights is priced from a sample. Quantizing 2^25 to seven types takes one core half a minute.
LARGEST_WITHOUT_SAMPLE = 2**25
SAMPLED_WEIGHTS = 2**23
SAMPLED_ROWS = 1024  # at least, however long they are
_PART_WEIGHTS = 2**22  # weights dequantized at a time: 16 MiB in float32
_SEED = 0


@dataclass(frozen=True)
class PricedRows:
    """Some rows of a tensor, all of one expert."""

    tensor: str
    expert: int
    rows: NDArray[np.intp]  # numbers in rising order, counted through all experts
    fisher: NDArray[np.float64]  # (rows,): the Fisher mean of each row and of those that it stands for
    stands_for: float  # how many rows of the tensor each of these stands for


def priced_weights(tensor: TensorInfo) -> int:
    """How many weights of a tensor are rounded to price it, at most."""
    return _priced_rows(tensor) * tensor.row_length


def _priced_rows(tensor: TensorInfo) -> int:
    rows = tensor.weights // tensor.row_length
    if tensor.weights <= LARGEST_WITHOUT_SAMPLE:
        return rows
    return min(rows, max(SAMPLED_ROWS, SAMPLED_WEIGHTS // tensor.row_length))


def parts_to_price(tensor: TensorInfo, fisher: Fisher) -> Iterator[PricedRows]:
    """Yield the rows that price a tensor, in parts."""
    *stacked, rows, row_length = tensor.shape
    means = fisher.rows.reshape(-1).astype(np.float64)
    chosen, sums = draw(means, _priced_rows(tensor))
    step = max(1, _PART_WEIGHTS // row_length)
    for expert in range(math.prod(stacked)):
        first, last = np.searchsorted(chosen, (expert * rows, (expert + 1) * rows))
        for start in range(first, last, step):
            some = slice(start, min(start + step, last))
            yield PricedRows(tensor.name, expert, chosen[some], sums[some], len(means) / len(chosen))


def draw(means: NDArray[np.float64], count: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Draw at most `count` rows: their numbers, and what of the sum of all means each stands for.

    The same means give the same rows. Rows of zero are drawn only if all are zero.
    """
    if count >= len(means):
        return np.arange(len(means)), means
    sizes = means if means.any() else np.ones_like(means)
    edges = np.cumsum(sizes)
    points = (np.arange(count) + np.random.default_rng(_SEED).random(count)) * (edges[-1] / count)
    rows, hits = np.unique(np.minimum(np.searchsorted(edges, points, side="right"), len(means) - 1), return_counts=True)
    return rows, hits * (means.sum() / count)
