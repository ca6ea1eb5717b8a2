"""What token sequences begin with in common, laid out so that a model evaluates it once.

Sorted, sequences that begin alike are neighbours. Neighbours become one batch, a tree, depth first: a token that several
of them share at the same place is in it once. What the next batch shares with the last sequence of this one stays
in the KV cache, so a preamble of a thousand sequences is evaluated once as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Tree:
    """Some of the sequences, as a batch of tokens that the cache does not hold yet.

    The k-th member's path gives, for each of its tokens, the index of that token in the batch; -1 where the cache holds
    it already: that is for its first `kept[k]` tokens, which it shares with the last member of the tree before.
    """

    members: tuple[int, ...]  # indices of the sequences, in sorted order
    kept: tuple[int, ...]
    paths: tuple[NDArray[np.int64], ...]
    tokens: Tokens
    positions: NDArray[np.int32]
    first: NDArray[np.int32]  # the members that share a token are neighbours: those from `first` to `last`
    last: NDArray[np.int32]


def trees(sequences: Sequence[Tokens], wanted_from: Sequence[int], *, tokens: int, members: int) -> Iterator[Tree]:
    """Put every sequence into a tree of at most `members`.

    `wanted_from[i]` is the first position of sequence i whose logits are wanted: from there on it is in the batch, whatever
    the cache holds. Cache and batch together have at most `tokens` more than the longest sequence. Sequences must differ.
    """
    order = sorted(range(len(sequences)), key=lambda index: sequences[index].astype(">i4").tobytes())
    trunk = np.empty(0, np.int32)  # the sequence that the cache holds
    done = 0
    while done < len(order):
        chosen, alike = _choose(order[done : done + members], sequences, trunk, tokens)
        done += len(chosen)
        yield _tree(alike, [sequences[index] for index in chosen], [wanted_from[index] for index in chosen], chosen)
        trunk = sequences[chosen[-1]]


def _choose(
    order: Sequence[int], sequences: Sequence[Tokens], trunk: Tokens, tokens: int
) -> tuple[list[int], list[int]]:
    """The next tree's members, and how many tokens each has in common with the one before it, the first with the trunk."""
    chosen: list[int] = []
    alike: list[int] = []
    size = 0
    for index in order:
        common = common_length(sequences[chosen[-1]] if chosen else trunk, sequences[index])
        size += len(sequences[index]) - common
        if chosen and size > tokens:
            break
        chosen.append(index)
        alike.append(common)
    return chosen, alike


def _tree(alike: Sequence[int], sequences: Sequence[Tokens], wanted_from: Sequence[int], chosen: Sequence[int]) -> Tree:
    """Lay out the batch of the chosen sequences."""
    cached = np.minimum.accumulate(alike)
    # the cache is cut back for all of them where one wants logits of what it holds
    kept = np.minimum(cached, np.where(wanted_from < cached, wanted_from, cached[0]).min()).tolist()
    paths: list[NDArray[np.int64]] = []
    size = 0
    for member, sequence in enumerate(sequences):
        shared = paths[-1][: alike[member]] if member else np.full(kept[0], -1)
        new = np.arange(size, size + len(sequence) - len(shared))
        paths.append(np.concatenate([shared, new]))
        size += len(new)
    tokens, positions, first, last = np.empty((4, size), np.int32)
    for member in reversed(range(len(sequences))):  # backwards: the first of those that share a token writes `first`
        path, begin = paths[member], kept[member]
        tokens[path[begin:]] = sequences[member][begin:]
        positions[path[begin:]] = np.arange(begin, len(path))
        first[path[begin:]] = member
    for member, path in enumerate(paths):
        last[path[kept[member] :]] = member
    return Tree(tuple(chosen), tuple(kept), tuple(paths), tokens, positions, first, last)


def common_length(one: Tokens, other: Tokens) -> int:
    """How many tokens two sequences begin with in common."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length
