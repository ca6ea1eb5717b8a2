"""Some rows of tensors, read and rounded to the nearest values by threads, before compensation makes their errors cancel out."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from samq.gguf.codes import CodeGrid, read_grid, write_codes
from samq.gguf.ggml import to_float
from samq.gguf.nearest import NearestRounding

_SLAB_WEIGHTS = 2**22  # that a thread reads, quantizes and packs at a time
_F16_ROUNDING = 2.0**-11  # the largest relative rounding error of F16

Place = tuple[str, str, slice]  # a tensor, a type, and rows


@dataclass(frozen=True)
class Slab:
    """Some rows of a tensor in a type."""

    name: str
    kind: str
    rows: slice
    weights: NDArray[np.float32]
    blocks: NDArray[np.uint8]

    @property
    def tensor(self) -> tuple[str, str]:
        """The tensor and its type."""
        return self.name, self.kind

    @cached_property
    def grid(self) -> CodeGrid:
        """What values the weights can have."""
        return read_grid(self.kind, self.blocks)

    @cached_property
    def change(self) -> NDArray[np.float32]:
        """The rounding errors, (rows, row length)."""
        return to_float(GGMLQuantizationType[self.kind], self.blocks, self.weights.shape[1]) - self.weights

    @cached_property
    def is_exact(self) -> bool:
        """Whether the error is within F16's own rounding, as if the full-precision GGUF was itself made from this type."""
        squares = [float(np.square(part).sum(dtype=np.float64)) for part in (self.change, self.weights)]
        return squares[0] <= _F16_ROUNDING**2 * squares[1]

    def without_change(self) -> "Slab":
        """The same, without what can be computed again: it is as large as the weights, and many slabs wait for their group."""
        self.__dict__.pop("change", None)
        return self

    def with_codes(self, codes: NDArray[np.uint8]) -> "Slab":
        """The same rows with other codes on their own scales; the errors of both are computed."""
        other = replace(self, blocks=write_codes(self.kind, self.blocks, codes))
        _ = self.change, other.change
        return other


def rows_in_slabs(full: NearestRounding, name: str, expert: int | None, limit: int | None = None) -> Iterator[slice]:
    """The rows of a tensor, or of one of its experts, in slabs of no more weights than the limit, but one row at least.

    The rows of stacked experts are numbered through.
    """
    rows, row_length = full.rows(name), full.row_length(name)
    of_one = rows // full.matrices(name)
    start, stop = (0, rows) if expert is None else (expert * of_one, (expert + 1) * of_one)
    step = max(1, min(limit or _SLAB_WEIGHTS, _SLAB_WEIGHTS) // row_length)
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def groups_of_slabs(
    full: NearestRounding, tensors: Iterable[tuple[str, str]], expert: int | None, limit: int
) -> list[list[Place]]:
    """The rows of all tensors, or of one of their experts, in slabs, in groups of no more weights than the limit."""
    groups: list[list[Place]] = [[]]
    weights = 0
    for name, kind in tensors:
        for rows in rows_in_slabs(full, name, expert, limit):
            size = (rows.stop - rows.start) * full.row_length(name)
            if groups[-1] and weights + size > limit:
                groups.append([])
                weights = 0
            groups[-1].append((name, kind, rows))
            weights += size
    return groups


def prepared(groups: Iterable[list[Place]], full: NearestRounding, rounded: NearestRounding) -> Iterator[list[Slab]]:
    """Yield the slabs of each group; meanwhile threads are at those of the next groups, one slab a thread or more."""

    def prepare(place: Place) -> Slab:
        name, kind, rows = place
        slab = Slab(name, kind, rows, full.weights(name, rows), rounded.blocks(name, kind, rows))
        _ = slab.is_exact or slab.grid  # by this thread
        return slab.without_change()

    coming, ahead = deque[list[Future[Slab]]](), len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(ahead, thread_name_prefix="round") as threads:
        for group in groups:
            coming.append([threads.submit(prepare, place) for place in group])
            while sum(map(len, coming)) - len(coming[0]) >= ahead:
                yield [slab.result() for slab in coming.popleft()]
        while coming:
            yield [slab.result() for slab in coming.popleft()]
