"""GPTQ for the rows of one input (Frantar et al. 2023, arXiv:2210.17323).

The columns of a weight matrix are rounded one after another, those with the largest inputs first. Each rounding error is
pushed onto the columns that follow. The Gram matrix says how the columns vary together, and so how much each one gets.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from samq.gguf.codes import GROUP, CodeGrid

_DAMPING = 0.01  # times the diagonal's mean, added to the diagonal as in GPTQ, since other texts differ from this one
_BAND = 128  # columns that are rounded before their errors reach the columns after the band
_BLOCK = 2048  # rows and columns of a matrix that are factored at a time


class Compensator:
    """GPTQ for the rows of one input: the order of their columns, and the share of an error that each column passes on.

    H is the damped Gram matrix, and U the upper Cholesky factor of its inverse. The best compensation of an error e of column
    j subtracts e U[j, k] / U[j, j] from each later column k. See Frantar et al., section 3.
    """

    def __init__(self, gram: torch.Tensor) -> None:
        """Raises torch.linalg.LinAlgError if the Gram matrix, (row length, row length), cannot be inverted."""
        self.device = gram.device
        self._gram = gram
        self._order, self._factor = _inverse_factor(gram)  # in float64: another copy would take half as much again

    def codes(self, parts: Sequence[tuple[NDArray[np.float32], CodeGrid]]) -> list[NDArray[np.uint8]]:
        """The codes, uint8, for weights (rows, row length) on the grids of their blocks; several tensors and types at once.

        The columns are sequential, so many rows take little longer than few.
        """
        codes: dict[int, NDArray[np.uint8]] = {}
        for numbers in _of_like_levels([grid for _, grid in parts]):
            some = [parts[number] for number in numbers]
            together = self._codes(some)
            ends = np.cumsum([len(weights) for weights, _ in some])
            for number, of_part in zip(numbers, np.split(together, ends[:-1]), strict=True):
                codes[number] = of_part + np.uint8(parts[number][1].first)
        return [codes[number] for number in range(len(parts))]

    def _codes(self, parts: Sequence[tuple[NDArray[np.float32], CodeGrid]]) -> NDArray[np.uint8]:
        """The numbers of the levels, (rows, row length), of parts with like levels."""
        levels = _levels([(len(weights), grid) for weights, grid in parts], self.device)
        # transposed, so that a column is contiguous
        scale, offset = (
            torch.cat([torch.from_numpy(array).to(self.device) for array in arrays]).t().contiguous()
            for arrays in zip(*((grid.scale, grid.offset) for _, grid in parts), strict=True)
        )
        scale[scale == 0] = 1  # a block with one value, which every code stands for
        columns, rows = len(self._order), [len(weights) for weights, _ in parts]
        remaining = torch.empty(columns, sum(rows), device=self.device)
        for of_part, (weights, _) in zip(remaining.split(rows, dim=1), parts, strict=True):
            of_part.copy_(torch.from_numpy(weights).to(self.device).t()[self._order])
        groups = self._order // GROUP
        codes = torch.empty(remaining.shape, dtype=torch.uint8, device=self.device)
        round_band = _RoundBand(levels)
        for first in range(0, columns, _BAND):
            band = slice(first, min(first + _BAND, columns))
            factor = self._factor[band].float()
            of_band, errors = round_band(remaining[band], scale[groups[band]], offset[groups[band]], factor[:, band])
            codes[self._order[band]] = of_band
            remaining[band.stop :].addmm_(factor[:, band.stop :].t(), errors, alpha=-1)
        return codes.t().contiguous().cpu().numpy()

    def output_error(self, error: NDArray[np.float32]) -> NDArray[np.float64]:
        """The mean square over tokens of each row's output error, (rows,), from the weights' errors (rows, row length)."""
        change = torch.from_numpy(error).to(self._gram.device)
        return ((change @ self._gram) * change).sum(1, dtype=torch.float64).cpu().numpy()


class _RoundBand:
    """`_round_band` for bands of the same rows. A GPU replays a CUDA graph of it: kernels run faster than they are launched."""

    def __init__(self, levels: "_Levels") -> None:
        self._levels = levels
        self._seen: list[torch.Size] = []  # of the band before
        self._graph: Any = None

    def __call__(self, *of_band: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `_round_band` returns; valid until the next call."""
        shapes = [tensor.shape for tensor in of_band]
        if not of_band[0].is_cuda or shapes != self._seen:  # runs once before it is recorded, which loads the kernels
            self._seen = shapes
            return _round_band(self._levels, *of_band)
        if self._graph is None:
            self._record(of_band)
        for own, given in zip(self._inputs, of_band, strict=True):
            own.copy_(given)
        self._graph.replay()
        return self._outputs

    def _record(self, of_band: tuple[torch.Tensor, ...]) -> None:
        device = of_band[0].device
        with torch.cuda.device(device):
            self._inputs = [tensor.clone(memory_format=torch.contiguous_format) for tensor in of_band]
            self._graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                self._graph.capture_begin(capture_error_mode="thread_local")  # other threads use other GPUs meanwhile
                self._outputs = _round_band(self._levels, *self._inputs)
                self._graph.capture_end()
            torch.cuda.current_stream(device).wait_stream(stream)


def _round_band(
    levels: "_Levels", remaining: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of the levels of a band's columns, and their errors over the diagonal of U, both (columns, rows).

    `remaining`, which is changed, `scale` and `offset` are (columns, rows); `factor` is U, (columns, columns).
    """
    codes = torch.empty(remaining.shape, dtype=torch.uint8, device=remaining.device)
    errors = torch.empty_like(remaining)
    for column, exact in enumerate(remaining):
        code, level = levels.nearest((exact - offset[column]).div_(scale[column]))
        rounded = level.mul_(scale[column]).add_(offset[column])
        torch.sub(exact, rounded, out=errors[column]).div_(factor[column, column])
        remaining[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
        codes[column] = code
    return codes, errors


class _Levels(Protocol):
    """The levels that the weights of some rows can have."""

    def nearest(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The number of the level nearest to each row's value, and the level; of two as near the lower."""


class _WholeLevels:
    """Whole numbers in turn, from a first one to a last one, which each row has its own of."""

    def __init__(self, first: torch.Tensor, last: torch.Tensor) -> None:
        self._first, self._count = first, last - first

    def nearest(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As the protocol says."""
        number = values.sub_(self._first).sub_(0.5).ceil_().clamp_(min=0).minimum(self._count)
        return number, number + self._first


class _AnyLevels:
    """Levels in rising order, the same for all rows."""

    def __init__(self, levels: torch.Tensor) -> None:
        self._levels, self._boundaries = levels, (levels[1:] + levels[:-1]) / 2

    def nearest(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As the protocol says."""
        number = torch.bucketize(values, self._boundaries)
        return number, self._levels[number]


def _is_whole(grid: CodeGrid) -> bool:
    return bool((np.diff(grid.levels) == 1).all())


def _of_like_levels(grids: Sequence[CodeGrid]) -> list[list[int]]:
    """The numbers of the grids that can be rounded to together: those of whole numbers, and those of the same levels."""
    alike: dict[bytes, list[int]] = {}
    for number, grid in enumerate(grids):
        alike.setdefault(b"" if _is_whole(grid) else grid.levels.tobytes(), []).append(number)
    return list(alike.values())


def _levels(parts: Sequence[tuple[int, CodeGrid]], device: torch.device) -> "_Levels":
    """The levels of rows, so many of each grid."""
    grids = [grid for _, grid in parts]
    if not _is_whole(grids[0]):
        return _AnyLevels(torch.from_numpy(grids[0].levels).to(device))
    rows = torch.tensor([count for count, _ in parts], device=device)
    first, last = (
        torch.tensor([float(grid.levels[end]) for grid in grids], device=device).repeat_interleave(rows)
        for end in (0, -1)
    )
    return _WholeLevels(first, last)


def variances(gram: torch.Tensor) -> tuple[float, float]:
    """The variance of all inputs together, damped, and of each input that which the inputs after it do not explain.

    With errors of all columns equally large, the ratio of the two is the share of the output's error that compensation leaves.
    Raises torch.linalg.LinAlgError as `Compensator` does.
    """
    order, factor = _inverse_factor(gram)
    together = _damped(gram)[order].sum()
    return float(together), float(
        (factor.diagonal() ** -2).sum()
    )  # 1 / U[j, j]^2 is what the inputs after j do not explain


def _damped(gram: torch.Tensor) -> torch.Tensor:
    """The diagonal with the damping, in float64."""
    diagonal = gram.diagonal().double()
    return diagonal + _DAMPING * diagonal.mean()


def _inverse_factor(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of the columns, largest inputs first, and U in that order, in float64."""
    damped = _damped(gram)
    order = torch.argsort(damped, descending=True, stable=True)
    factor = torch.empty_like(gram, dtype=torch.float64)
    for rows, numbers in zip(factor.split(_BLOCK), order.split(_BLOCK), strict=True):  # the matrix is large
        rows.copy_(gram[numbers][:, order])
    factor.diagonal().copy_(damped[order])
    return order, invert_upper_(cholesky_upper_(factor))


def cholesky_upper_(matrix: torch.Tensor) -> torch.Tensor:
    """Replace a positive definite matrix A by the upper triangle R of A = R R^T, block by block from the last; zeros below.

    In place, since a matrix of 28672 columns takes 6.6 GB in float64. Raises torch.linalg.LinAlgError if A is not positive
    definite.
    """
    for stop in range(len(matrix), 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        here, before = slice(start, stop), slice(0, start)
        # with rows and columns reversed, the upper triangle is torch's lower one
        own = torch.linalg.cholesky(matrix[here, here].flip(0, 1)).flip(0, 1)
        above = torch.linalg.solve_triangular(own.t(), matrix[before, here], upper=False, left=False)
        matrix[here, here], matrix[before, here], matrix[here, before] = own, above, 0
        matrix[before, before].addmm_(above, above.t(), alpha=-1)
    return matrix


def invert_upper_(matrix: torch.Tensor) -> torch.Tensor:
    """Replace an upper triangular matrix by its inverse, in place."""
    for start in range(0, len(matrix), _BLOCK):
        here, before = slice(start, start + _BLOCK), slice(0, start)
        own = matrix[here, here]
        own = torch.linalg.solve_triangular(own, torch.eye(len(own), dtype=own.dtype, device=own.device), upper=True)
        matrix[before, here] = -(matrix[before, before] @ matrix[before, here]) @ own
        matrix[here, here] = own
    return matrix
