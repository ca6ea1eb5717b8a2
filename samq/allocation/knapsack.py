"""The best choice of one type for each tensor within a limit of bytes.

A multiple-choice knapsack, solved exactly. Types that cost a tensor no fewer bytes and no less KL than another
are left out first: they are in no best plan.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from samq.records import Price

Options = Mapping[str, Mapping[str, Price]]  # tensor -> type -> price

_BISECTIONS = 100  # of the price of a byte: to the last bit of a float64, nearly
_DISTANCES = (1 / 64, 1 / 16, 1 / 4, 1)  # searched in turn, of the whole: the best plan mostly lies near the bound
_MOST_STATES = 2**20  # of the dynamic programming; beyond, the plan is reported with its gap


@dataclass(frozen=True)
class Solution:
    """The best choice found, and how far from the bound it can be, relative to its cost."""

    types: dict[str, str]
    gap: float


def solve(options: Options, limit: int) -> Solution:
    """One type a tensor with least summed KL and at most `limit` bytes, which must be possible; exact.

    With a price of `rate` nats a byte every tensor chooses for itself, which bounds the least cost from below (Lagrange).
    The right rate also gives a plan close to that bound. For most tensors only one option can then be in a better plan.
    Dynamic programming over the rest finds the best.
    """
    names = list(options)
    kinds, sizes, costs, rows = [], [], [], []
    for row, types in enumerate(options.values()):
        for kind, price in undominated(types).items():
            kinds.append(kind)
            sizes.append(price.bytes)
            costs.append(price.kl_nats)
            rows.append(row)
    choices = _Choices(np.array(rows), np.array(sizes, np.int64), np.array(costs))
    if choices.smallest > limit:
        raise ValueError(f"the smallest choice has {choices.smallest} bytes and the limit is {limit}")
    best, gap = choices.best(limit)
    return Solution({names[rows[option]]: kinds[option] for option in best}, gap)


@dataclass(frozen=True)
class _Choices:
    """All options of all tensors side by side: whose (`row`), bytes and KL; a tensor's by rising bytes, falling KL."""

    row: NDArray[np.int64]
    size: NDArray[np.int64]
    cost: NDArray[np.float64]

    @cached_property
    def firsts(self) -> NDArray[np.intp]:
        """Each tensor's smallest option."""
        return np.flatnonzero(np.diff(self.row, prepend=-1))

    @property
    def smallest(self) -> int:
        """Bytes of the smallest plan."""
        return int(self.size[self.firsts].sum())

    def best(self, limit: int) -> tuple[NDArray[np.intp], float]:
        """The options of the cheapest plan within `limit`, and how far above the best its cost can be, relative to it."""
        best = np.append(self.firsts[1:], len(self.row)) - 1
        if self.size[best].sum() <= limit:
            return best, 0.0
        low, high, best = 0.0, 2 * float(self.cost.max()), self.firsts  # at `high` a byte is dearer than any KL
        for _ in range(_BISECTIONS):
            rate = (low + high) / 2
            chosen = self._cheapest(rate)
            if self.size[chosen].sum() > limit:
                low = rate
            else:
                high, best = rate, chosen
        excess = self.cost + high * self.size
        least = np.minimum.reduceat(excess, self.firsts)
        excess -= least[self.row]
        best = self._filled(best, limit)
        cost = math.fsum(self.cost[best])
        distance = max(0.0, cost - float(least.sum() - high * limit)) + 1e-12 * cost  # rounding
        for share in _DISTANCES:
            better, complete = self._search(excess, high, limit, share * distance)
            if better is not None and complete:
                break
        if better is not None and math.fsum(self.cost[better]) <= cost:
            best = better
        return best, 0.0 if complete else distance / cost

    def _cheapest(self, rate: float) -> NDArray[np.intp]:
        """Each tensor's option of least KL and priced bytes, the smallest of equals."""
        total = self.cost + rate * self.size
        equal = np.flatnonzero(total <= np.minimum.reduceat(total, self.firsts)[self.row])
        return equal[np.flatnonzero(np.diff(self.row[equal], prepend=-1))]

    def _filled(self, best: NDArray[np.intp], limit: int) -> NDArray[np.intp]:
        """Spend what a plan leaves of the limit: again and again the change that saves most KL and still fits."""
        best = best.copy()
        while True:
            fits = self.size - self.size[best][self.row] <= limit - self.size[best].sum()
            saving = np.where(fits, self.cost[best][self.row] - self.cost, 0.0)
            change = int(np.argmax(saving))
            if saving[change] <= 0:
                return best
            best[self.row[change]] = change

    def _search(
        self, excess: NDArray[np.float64], rate: float, limit: int, distance: float
    ) -> tuple[NDArray[np.intp] | None, bool]:
        """The best plan whose options' summed `excess`, and idle bytes at `rate`, are at most `distance`; and whether
        the search was complete. None: there is none.

        A state is a choice for the tensors so far. It is kept if no other is both smaller and cheaper, and if the largest
        options of the other tensors could still reach the distance.
        """
        core = np.flatnonzero(excess <= distance)
        groups = np.split(core, np.flatnonzero(np.diff(self.row[core])) + 1)
        groups.sort(key=len)  # tensors without a choice first: they add no states
        to_come = sum(int(self.size[group].max()) for group in groups)
        size, over = np.zeros(1, np.int64), np.zeros(1)
        trail: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
        complete = True
        for group in groups:
            to_come -= int(self.size[group].max())
            sizes = np.add.outer(self.size[group], size).ravel()
            overs = np.add.outer(excess[group], over).ravel()
            idle = np.maximum(0, limit - to_come - sizes)
            kept = np.flatnonzero((sizes <= limit) & (overs + rate * idle <= distance))
            kept = kept[np.lexsort((overs[kept], sizes[kept]))]
            costs = overs[kept] - rate * sizes[kept]
            kept = kept[costs < np.minimum.accumulate(np.append(np.inf, costs))[:-1]]
            if len(kept) > _MOST_STATES:
                kept = np.sort(kept[np.argsort(overs[kept], kind="stable")[:_MOST_STATES]])
                complete = False
            trail.append((group[kept // len(size)], kept % len(size)))
            size, over = sizes[kept], overs[kept]
        if len(size) == 0:
            return None, complete
        state = int(np.argmin(over - rate * size))
        chosen = []
        for options, parents in reversed(trail):
            chosen.append(int(options[state]))
            state = int(parents[state])
        return np.sort(np.array(chosen)), complete


def undominated(types: Mapping[str, Price]) -> dict[str, Price]:
    """The types that no other beats: as bytes rise, KL falls."""
    kept: dict[str, Price] = {}
    least = math.inf
    for kind, price in sorted(types.items(), key=lambda item: (item[1].bytes, item[1].kl_nats, item[0])):
        if price.kl_nats < least:
            kept[kind] = price
            least = price.kl_nats
    return kept
