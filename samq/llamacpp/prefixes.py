"""Lays out token sequences so that a model evaluates their common prefixes once.

In sorted order, sequences with a common prefix are neighbours. Neighbours become one batch, a tree in depth-first order:
a token that several of them share at the same position is in the batch once. The prefix that the next batch shares with
the last sequence of this one stays in the KV cache. So a prefix of a thousand sequences is evaluated once as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Tree:
    """Some of the sequences, as a batch of tokens that the cache does not hold yet.

    The path of the k-th member gives, for each of its tokens, the index of that token in the batch. It is -1 for the first
    `kept[k]` tokens, which the cache holds already: the member shares them with the last member of the tree before.
    """

    members: tuple[int, ...]  # indices of the sequences, in sorted order
    kept: tuple[int, ...]
    paths: tuple[NDArray[np.int64], ...]
    tokens: Tokens
    positions: NDArray[np.int32]
    first: NDArray[np.int32]  # the members from `first` to `last`, which are neighbours, share a token
    last: NDArray[np.int32]


def trees(sequences: Sequence[Tokens], logits_from: Sequence[int], *, tokens: int, members: int) -> Iterator[Tree]:
    """Put every sequence into a tree of at most `members`.

    `logits_from[i]` is the first position of sequence i whose logits are needed. From there on its tokens are in the batch,
    even if the cache holds them. Cache and batch together have at most `tokens` more than the longest sequence. The
    sequences must differ.
    """
    order = sorted(range(len(sequences)), key=lambda index: sequences[index].astype(">i4").tobytes())
    trunk = np.empty(0, np.int32)  # the sequence that the cache holds
    start = 0
    while start < len(order):
        chosen, common = _choose(order[start : start + members], sequences, trunk, tokens)
        start += len(chosen)
        yield _tree(common, [sequences[index] for index in chosen], [logits_from[index] for index in chosen], chosen)
        trunk = sequences[chosen[-1]]


def _choose(
    order: Sequence[int], sequences: Sequence[Tokens], trunk: Tokens, tokens: int
) -> tuple[list[int], list[int]]:
    """The next tree's members, and the length of the prefix that each shares with the one before, the first with the trunk."""
    chosen: list[int] = []
    common: list[int] = []
    size = 0
    for index in order:
        length = common_length(sequences[chosen[-1]] if chosen else trunk, sequences[index])
        size += len(sequences[index]) - length
        if chosen and size > tokens:
            break
        chosen.append(index)
        common.append(length)
    return chosen, common


def _tree(
    common: Sequence[int], sequences: Sequence[Tokens], logits_from: Sequence[int], chosen: Sequence[int]
) -> Tree:
    """Lay out the batch of the chosen sequences."""
    cached = np.minimum.accumulate(common)
    # if one member needs logits of tokens in the cache, the cache is cut back for all
    kept = np.minimum(cached, np.where(logits_from < cached, logits_from, cached[0]).min()).tolist()
    paths: list[NDArray[np.int64]] = []
    size = 0
    for member, sequence in enumerate(sequences):
        shared = paths[-1][: common[member]] if member else np.full(kept[0], -1)
        new = np.arange(size, size + len(sequence) - len(shared))
        paths.append(np.concatenate([shared, new]))
        size += len(new)
    tokens, positions, first, last = np.empty((4, size), np.int32)
    for member in reversed(range(len(sequences))):  # backwards: the first member that has a token writes `first` last
        path, begin = paths[member], kept[member]
        tokens[path[begin:]] = sequences[member][begin:]
        positions[path[begin:]] = np.arange(begin, len(path))
        first[path[begin:]] = member
    for member, path in enumerate(paths):
        last[path[kept[member] :]] = member
    return Tree(tuple(chosen), tuple(kept), tuple(paths), tokens, positions, first, last)


def common_length(one: Tokens, other: Tokens) -> int:
    """Length of the common prefix of two sequences."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length
