"""Log-probabilities of continuations, many at once: what requests begin with in common is evaluated once.

Several continuations of one context cost the context once, and one-token continuations of it (the letters of a
multiple-choice question) cost nothing besides. Requests that share no beginning share batches. What shares a batch
changes a log-probability by no more than rounding; the order of evaluation is fixed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from samq.errors import SamqError
from samq.evaluation.llama import PHYSICAL_BATCH_TOKENS, Context, Model
from samq.evaluation.prefixes import Tokens, Tree, trees

_MEMBERS = 64  # sequences of a batch; that of the batch before, which the cache keeps, comes on top


@dataclass(frozen=True)
class Continuation:
    """Tokens whose probability after a context is asked for; neither is empty."""

    context: Tokens
    tokens: Tokens


@dataclass(frozen=True)
class Score:
    """What a continuation got."""

    index: int  # of the request
    log_probability: float  # in nats, summed over its tokens
    is_greedy: bool  # whether each of its tokens is the most probable one


@dataclass
class _Input:
    """What is evaluated: a context and its continuation but for the last token, which nothing has to follow."""

    tokens: Tokens
    requests: list[int] = field(default_factory=list)  # those with this input
    wanted_from: int = 0  # the first position whose logits one of them needs


def score(
    model: Model,
    requests: Sequence[Continuation],
    *,
    kv_type: str = "F16",
    threads: int | None = None,
) -> Iterator[Score]:
    """Yield the score of each request, in an order of its own. Raises SamqError if a logit is not finite."""
    inputs = _distinct(requests)
    if not inputs:
        return
    longest = max(len(item.tokens) for item in inputs)
    plan = trees(
        [item.tokens for item in inputs],
        [0 if model.is_recurrent else item.wanted_from for item in inputs],
        tokens=PHYSICAL_BATCH_TOKENS,
        members=1 if model.is_recurrent else _MEMBERS,
    )
    with model.context(
        longest + PHYSICAL_BATCH_TOKENS,
        sequences=_MEMBERS + 1,
        outputs=PHYSICAL_BATCH_TOKENS,
        kv_type=kv_type,
        threads=threads,
        shared=True,
    ) as context:
        for tree in plan:
            yield from _score_tree(context, tree, inputs, requests)


def _distinct(requests: Sequence[Continuation]) -> list[_Input]:
    """The different inputs of the requests."""
    inputs: dict[bytes, _Input] = {}
    for index, request in enumerate(requests):
        tokens = np.concatenate([request.context, request.tokens[:-1]]).astype(np.int32)
        item = inputs.setdefault(tokens.tobytes(), _Input(tokens, wanted_from=len(tokens)))
        item.requests.append(index)
        item.wanted_from = min(item.wanted_from, len(request.context) - 1)
    return list(inputs.values())


def _score_tree(
    context: Context, tree: Tree, inputs: Sequence[_Input], requests: Sequence[Continuation]
) -> Iterator[Score]:
    """Evaluate a tree and score the requests of its members; the last member is left in the cache, as sequence 0."""
    context.forget(0, tree.kept[0])
    for member, kept in enumerate(tree.kept):
        if kept:
            context.copy(0, 1 + member, kept)
    found = [request for index in tree.members for request in inputs[index].requests]
    # a row for each token of a continuation: where in the batch its probability is known, and what it is
    nodes = np.concatenate(
        [
            path[len(requests[request].context) - 1 :]
            for index, path in zip(tree.members, tree.paths, strict=True)
            for request in inputs[index].requests
        ]
    )
    targets = np.concatenate([requests[request].tokens for request in found])
    log_probabilities, is_best = _evaluate(context, tree, nodes, targets)
    ends = np.cumsum([len(requests[request].tokens) for request in found])
    for request, begin, end in zip(found, [0, *ends[:-1]], ends, strict=True):
        yield Score(request, float(log_probabilities[begin:end].sum()), bool(is_best[begin:end].all()))
    context.forget(0)
    context.copy(len(tree.members), 0)
    for member in range(len(tree.members)):
        context.forget(1 + member)


def _evaluate(
    context: Context, tree: Tree, nodes: NDArray[np.int64], targets: Tokens
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Run the tree's batch; for each node, the target's log-probability after it, and whether the target is the best."""
    wanted = np.zeros(len(tree.tokens), bool)
    wanted[nodes] = True
    row_of = wanted.cumsum() - 1
    log_probabilities, is_best = np.empty(len(nodes)), np.empty(len(nodes), bool)
    for start in range(0, len(tree.tokens), PHYSICAL_BATCH_TOKENS):
        piece = slice(start, start + PHYSICAL_BATCH_TOKENS)
        first, last = 1 + tree.first[piece], 1 + tree.last[piece]
        sequences = np.concatenate([np.arange(one, other + 1) for one, other in zip(first, last, strict=True)])
        logits = context.decode(
            tree.tokens[piece], tree.positions[piece], sequences, wanted[piece], counts=last - first + 1
        )
        here = np.flatnonzero((nodes >= start) & (nodes < start + PHYSICAL_BATCH_TOKENS))
        if not len(here):
            continue
        rows = row_of[nodes[here]] - wanted[:start].sum()
        partition, best = _reduce(logits)
        if not np.isfinite(partition).all():
            raise SamqError(f"{context.model.path} gives logits that are not finite; quantize it again")
        log_probabilities[here] = logits[rows, targets[here]] - partition[rows]
        is_best[here] = best[rows] == targets[here]
    return log_probabilities, is_best


def _reduce(logits: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For each row, the logarithm of the sum of the exponentials, and the index of the highest."""
    partition, best = np.empty(len(logits)), np.empty(len(logits), np.int64)
    for index, row in enumerate(logits):  # one at a time: it stays in the processor's cache, which halves the time
        best[index] = top = row.argmax()
        partition[index] = row[top] + np.log(np.exp(row - row[top]).sum(dtype=np.float64))
    return partition, best
