"""Log-probabilities of many continuations at once: prefixes that requests share are evaluated once.

Several continuations of one context cost the context once. One-token continuations of it, such as the letters of a
multiple-choice question, add no cost. Requests without a common prefix share batches. The other requests of a batch
change a log-probability by no more than rounding, and the order of evaluation is fixed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from samq.errors import SamqError
from samq.gguf.values import logits_not_finite
from samq.llamacpp.prefixes import Tokens, Tree, trees
from samq.llamacpp.runtime import PHYSICAL_BATCH_TOKENS, Context, Model

_MEMBERS = 64  # sequences of a batch; the cache has one more, the last of the batch before


@dataclass(frozen=True)
class Continuation:
    """Tokens to score after a context; neither is empty."""

    context: Tokens
    tokens: Tokens


@dataclass(frozen=True)
class Score:
    """The score of a continuation."""

    index: int  # of the request
    log_probability: float  # in nats, summed over its tokens
    is_greedy: bool  # whether each of its tokens is the most probable one


@dataclass
class _Input:
    """Tokens to evaluate: a context and its continuation without the last token, whose logits nobody needs."""

    tokens: Tokens
    requests: list[int] = field(default_factory=list)  # indices of the requests with this input
    logits_from: int = 0  # the first position whose logits one of them needs


def score(
    model: Model,
    requests: Sequence[Continuation],
    *,
    kv_type: str = "F16",
    threads: int | None = None,
    failed: Callable[[int, str], None] | None = None,
) -> Iterator[Score]:
    """Yield the score of each request, in another order than theirs.

    A request has no score if its logits are not finite, or if llama.cpp fails on its batch. Logits that are not finite can
    spread to the other requests of the batch. `failed` then gets the index of the request and the reason, and the other
    requests are scored. Raises SamqError instead if there is no `failed`, and if there is not enough memory.
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
                [0 if model.is_recurrent else item.logits_from for item in inputs],
                tokens=PHYSICAL_BATCH_TOKENS,
                members=1 if model.is_recurrent else _MEMBERS,
            )
            evaluated: set[int] = set()
            for tree in plan:
                evaluated.update(tree.members)
                reasons: dict[int, str] = {}
                try:
                    scores = _score_tree(context, tree, inputs, requests)
                except SamqError as error:
                    if failed is None:
                        raise
                    scores, reasons = [], dict.fromkeys(_requests(tree, inputs), str(error))
                for result in scores:
                    if math.isnan(result.log_probability):
                        reasons[result.index] = logits_not_finite(model.path)
                    else:
                        yield result
                for request, reason in reasons.items():
                    if failed is None:
                        raise SamqError(reason)
                    failed(request, reason)
                if reasons:  # the cache lacks what the next trees need, or has NaN: plan the remaining inputs again
                    context.clear(values=True)
                    break
            inputs = [item for index, item in enumerate(inputs) if index not in evaluated]


def _distinct(requests: Sequence[Continuation]) -> list[_Input]:
    """The different inputs of the requests."""
    inputs: dict[bytes, _Input] = {}
    for index, request in enumerate(requests):
        tokens = np.concatenate([request.context, request.tokens[:-1]]).astype(np.int32)
        item = inputs.setdefault(tokens.tobytes(), _Input(tokens, logits_from=len(tokens)))
        item.requests.append(index)
        item.logits_from = min(item.logits_from, len(request.context) - 1)
    return list(inputs.values())


def _requests(tree: Tree, inputs: Sequence[_Input]) -> list[int]:
    """The requests of a tree's members."""
    return [request for index in tree.members for request in inputs[index].requests]


def _score_tree(
    context: Context, tree: Tree, inputs: Sequence[_Input], requests: Sequence[Continuation]
) -> list[Score]:
    """Evaluate a tree and score the requests of its members; leave the last member in the cache, as sequence 0.

    The log-probability is NaN where logits are not finite.
    """
    context.forget(0, tree.kept[0])
    for member, kept in enumerate(tree.kept):
        if kept:
            context.copy(0, 1 + member, kept)
    scored = _requests(tree, inputs)
    # for each token of a continuation: the index in the batch of the token before it, and the token itself
    nodes = np.concatenate(
        [
            path[len(requests[request].context) - 1 :]
            for index, path in zip(tree.members, tree.paths, strict=True)
            for request in inputs[index].requests
        ]
    )
    targets = np.concatenate([requests[request].tokens for request in scored])
    log_probabilities, is_best = _evaluate(context, tree, nodes, targets)
    ends = np.cumsum([len(requests[request].tokens) for request in scored])
    context.forget(0)
    context.copy(len(tree.members), 0)
    for member in range(len(tree.members)):
        context.forget(1 + member)
    return [
        Score(request, float(log_probabilities[begin:end].sum()), bool(is_best[begin:end].all()))
        for request, begin, end in zip(scored, [0, *ends[:-1]], ends, strict=True)
    ]


def _evaluate(
    context: Context, tree: Tree, nodes: NDArray[np.int64], targets: Tokens
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Run the tree's batch; for each node, the log-probability of the target after it, and whether the target is best.

    The log-probability is NaN where a logit is NaN or infinite.
    """
    needed = np.zeros(len(tree.tokens), bool)
    needed[nodes] = True
    row_of = needed.cumsum() - 1
    log_probabilities, is_best = np.empty(len(nodes)), np.empty(len(nodes), bool)
    for start in range(0, len(tree.tokens), PHYSICAL_BATCH_TOKENS):
        piece = slice(start, start + PHYSICAL_BATCH_TOKENS)
        first, last = 1 + tree.first[piece], 1 + tree.last[piece]
        sequences = np.concatenate([np.arange(one, other + 1) for one, other in zip(first, last, strict=True)])
        logits = context.decode(
            tree.tokens[piece], tree.positions[piece], sequences, needed[piece], counts=last - first + 1
        )
        here = np.flatnonzero((nodes >= start) & (nodes < start + PHYSICAL_BATCH_TOKENS))
        if not len(here):
            continue
        rows = row_of[nodes[here]] - needed[:start].sum()
        partition, best = _reduce(logits)
        log_probabilities[here] = logits[rows, targets[here]] - partition[rows]
        is_best[here] = best[rows] == targets[here]
    return log_probabilities, is_best


def _reduce(logits: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For each row, the logarithm of the sum of the exponentials, and the index of the highest logit.

    If a row has NaN, the highest logit is its first NaN. The logarithm is NaN then, and also if the highest is infinite.
    """
    partition, best = np.empty(len(logits)), np.empty(len(logits), np.int64)
    with np.errstate(invalid="ignore"):
        for index, row in enumerate(logits):  # one at a time: a row fits the processor's cache, which halves the time
            best[index] = top = row.argmax()
            partition[index] = row[top] + np.log(np.exp(row - row[top]).sum(dtype=np.float64))
    return partition, best
