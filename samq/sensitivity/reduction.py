"""What a measurement keeps of gradients: a few numbers for each weight and sequence, and sums over all sequences."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from samq.sensitivity.weight_gradients import Gradients


@dataclass(frozen=True)
class Reduced:
    """What is kept of one weight's gradients on the sequences of a batch."""

    numbers: torch.Tensor  # (sequences, numbers), in float64
    totals: tuple[torch.Tensor, ...] = ()  # summed over the batch's sequences already


# (the weight's index, gradients of the sequences of a batch, or of some rows of theirs) -> what is kept of them. What it gives
# for several parts of a sequence's gradient is added up.
Reduce = Callable[[int, Gradients], Reduced]


class Sums:
    """What is kept of all weights and sequences, where the gradients are: copies to the host would stall a GPU.

    Totals are added up in the order of the sequences, whatever the number of devices that share them: so are the bits.
    """

    def __init__(self, weights: int, sequences: int, reduce: Reduce) -> None:
        self._weights, self._sequences, self._reduce = weights, sequences, reduce
        self._numbers: dict[int, torch.Tensor] = {}  # weight's index -> (sequences, numbers)
        self._totals: dict[int, list[torch.Tensor]] = {}
        self._changed: set[int] = set()
        self._share = 0
        self._waiting: dict[int, list[tuple[int, int, Reduced]]] = defaultdict(list)  # of each share but the first

    def begin(self, share: int) -> None:
        """Say which share of the sequences the next gradients are of. The first comes first; others wait for `add_shares`."""
        self._share = share

    def receive(self, index: int, first: int, gradients: Gradients) -> None:
        """Add what is kept of some gradients; `first` is the number of the first of their sequences."""
        reduced = self._reduce(index, gradients)
        if self._share:
            self._waiting[self._share].append((index, first, reduced))
        else:
            self._add(index, first, reduced)

    def add_shares(self) -> None:
        """Add what waits."""
        for share in sorted(self._waiting):
            for index, first, reduced in self._waiting.pop(share):
                self._add(index, first, reduced)

    def _add(self, index: int, first: int, reduced: Reduced) -> None:
        numbers = reduced.numbers
        if index not in self._numbers:
            self._numbers[index] = numbers.new_zeros(self._sequences, numbers.shape[1])
            self._totals[index] = [torch.zeros_like(total) for total in reduced.totals]
        self._numbers[index][first : first + len(numbers)] += numbers.to(self._numbers[index].device)
        for sums, total in zip(self._totals[index], reduced.totals, strict=True):
            sums += total.to(sums.device)
        self._changed.add(index)

    def numbers(self) -> np.ndarray:
        """(weights, sequences, numbers); zero for a weight that no gradient came for."""
        width = max((numbers.shape[1] for numbers in self._numbers.values()), default=0)
        none = torch.zeros(self._sequences, width, dtype=torch.float64)
        return np.stack([self._numbers.get(index, none).cpu().numpy() for index in range(self._weights)])

    def totals(self, index: int) -> tuple[torch.Tensor, ...]:
        """The sums over all sequences; empty if no gradient came."""
        return tuple(total.cpu() for total in self._totals.get(index, ()))

    def changes(self) -> dict[str, torch.Tensor]:
        """What `restore` takes, of the weights that gradients came for since this was asked last: copies, where they are."""
        state = {}
        for index in sorted(self._changed):
            state[f"numbers.{index}"] = self._numbers[index].clone()
            state |= {f"total.{index}.{place}": total.clone() for place, total in enumerate(self._totals[index])}
        self._changed.clear()
        return state

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Have what `changes` gave, in another process perhaps."""
        for index in [int(name.removeprefix("numbers.")) for name in state if name.startswith("numbers.")]:
            self._numbers[index] = state[f"numbers.{index}"].clone()
            totals = sum(name.startswith(f"total.{index}.") for name in state)
            self._totals[index] = [state[f"total.{index}.{place}"].clone() for place in range(totals)]
