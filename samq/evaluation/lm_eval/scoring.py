"""Log-probabilities of continuations, many at once: what requests begin with in common is evaluated once.

Several continuations of one context cost the context once, and one-token continuations of it (the letters of a
multiple-choice question) cost nothing besides. Requests that share no beginning share batches. What shares a batch
changes a log-probability by no more than rounding; the order of evaluation is fixed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from samq.errors import SamqError
from samq.evaluation.lm_eval.prefixes import Tokens, Tree, trees
from samq.llamacpp.runtime import PHYSICAL_BATCH_TOKENS, Context, Model

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
    failed: Callable[[int, str], None] | None = None,
) -> Iterator[Score]:
    """Yield the score of each request, in an order of its own.

    A request whose logits are not finite (one can spread this to what shares its batch), or whose batch llama.cpp fails
    on, has no score: `failed` is told its index and the reason, and the others are scored. Raises SamqError instead if
    there is no `failed`, and if there is no memory.
    """
    inputs = _distinct(requests)
    if not inputs:
        return
    longest = max(len(item.tokens) for item in inputs)
    with model.context(
        longest + PHYSICAL_BATCH_TOKENS,
        sequences=_MEMBERS + 1,
        outputs=PHYSICAL_BATCH_TOKENS,
        kv_type=kv_type,
        threads=threads,
        shared=True,
    ) as context:
        while inputs:
            plan = trees(
                [item.tokens for item in inputs],
                [0 if model.is_recurrent else item.wanted_from for item in inputs],
                tokens=PHYSICAL_BATCH_TOKENS,
                members=1 if model.is_recurrent else _MEMBERS,
            )
            done: set[int] = set()
            for tree in plan:
                done.update(tree.members)
                reasons: dict[int, str] = {}
                try:
                    scores = _score_tree(context, tree, inputs, requests)
                except SamqError as error:
                    if failed is None:
                        raise
                    scores, reasons = [], dict.fromkeys(_requests(tree, inputs), str(error))
                for found in scores:
                    if math.isnan(found.log_probability):
                        reasons[found.index] = f"{model.path} gives logits that are not finite; quantize it again"
                    else:
                        yield found
                for request, reason in reasons.items():
                    if failed is None:
                        raise SamqError(reason)
                    failed(request, reason)
                if reasons:  # what the next trees expect in the cache is lost or spoilt: they are planned anew
                    context.clear(values=True)
                    break
            inputs = [item for index, item in enumerate(inputs) if index not in done]


def _distinct(requests: Sequence[Continuation]) -> list[_Input]:
    """The different inputs of the requests."""
    inputs: dict[bytes, _Input] = {}
    for index, request in enumerate(requests):
        tokens = np.concatenate([request.context, request.tokens[:-1]]).astype(np.int32)
        item = inputs.setdefault(tokens.tobytes(), _Input(tokens, wanted_from=len(tokens)))
        item.requests.append(index)
        item.wanted_from = min(item.wanted_from, len(request.context) - 1)
    return list(inputs.values())


def _requests(tree: Tree, inputs: Sequence[_Input]) -> list[int]:
    """The requests of a tree's members."""
    return [request for index in tree.members for request in inputs[index].requests]


def _score_tree(
    context: Context, tree: Tree, inputs: Sequence[_Input], requests: Sequence[Continuation]
) -> list[Score]:
    """Evaluate a tree and score the requests of its members; the last member is left in the cache, as sequence 0.

    The log-probability is NaN where logits are not finite.
    """
    context.forget(0, tree.kept[0])
    for member, kept in enumerate(tree.kept):
        if kept:
            context.copy(0, 1 + member, kept)
    found = _requests(tree, inputs)
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
    context.forget(0)
    context.copy(len(tree.members), 0)
    for member in range(len(tree.members)):
        context.forget(1 + member)
    return [
        Score(request, float(log_probabilities[begin:end].sum()), bool(is_best[begin:end].all()))
        for request, begin, end in zip(found, [0, *ends[:-1]], ends, strict=True)
    ]


def _evaluate(
    context: Context, tree: Tree, nodes: NDArray[np.int64], targets: Tokens
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Run the tree's batch; for each node, the target's log-probability after it, and whether the target is the best.

    The log-probability is NaN where a logit is NaN or infinite.
    """
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
        log_probabilities[here] = logits[rows, targets[here]] - partition[rows]
        is_best[here] = best[rows] == targets[here]
    return log_probabilities, is_best


def _reduce(logits: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For each row, the logarithm of the sum of the exponentials, and the index of the highest.

    The highest is the first NaN if there is one; the logarithm is NaN then, and where the highest is infinite.
    """
    partition, best = np.empty(len(logits)), np.empty(len(logits), np.int64)
    with np.errstate(invalid="ignore"):
        for index, row in enumerate(logits):  # one at a time: it stays in the processor's cache, which halves the time
            best[index] = top = row.argmax()
            partition[index] = row[top] + np.log(np.exp(row - row[top]).sum(dtype=np.float64))
    return partition, best
