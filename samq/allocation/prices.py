"""Prices: what each tensor costs in each type of a ladder, in bytes and in predicted KL.

The rounding error is not modelled: it is what llama-quantize really did to the tensor, read back from the rung. With F
the Fisher information (samq.sensitivity.fisher: means over rows and columns), a tensor in a type costs

    KL = sum over weights of F dW^2 / 2,  nats per token,

the second-order term of the KL divergence without the terms between weights. Prices of tensors add up to a plan's.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from gguf import ReaderTensor
from numpy.typing import NDArray

from samq.allocation.ladder import Ladder
from samq.errors import SamqError
from samq.gguf.file import TensorInfo, open_gguf, read_rows
from samq.gguf.formats import tensor_bytes
from samq.progress import Progress, silent
from samq.records import Metric, Plan, Price, PriceTable, SensitivityMap, TensorPrices
from samq.sensitivity.fisher import Fisher

# Weights that a type makes longer by so much (relative) cost more, mixed with others, than their prices say: their errors have
# one sign. IQ3_S lengthens by 2 to 3 %, no other type by a thousandth (benchmarks/low_bits.py). Shorter is another matter: Q3_K
# takes 1 % of the length and Q2_K 4 %, as values in the middle of what is rounded to them are, and Q3_K given back its length
# does no better.
LENGTHENING_LIMIT = 0.01
# From this KL on, predicted or measured, rounding is no small change and second order fails.
SECOND_ORDER_LIMIT_NATS = 0.3
_SLAB_WEIGHTS = 2**22  # weights dequantized at a time: 16 MiB in float32


def price_table(
    ladder: Ladder,
    quantizable: Mapping[str, TensorInfo],
    sensitivity: SensitivityMap,
    fisher: Mapping[str, Fisher],
    *,
    gguf_sha256: str,
    imatrix_sha256: str | None = None,
    progress: Progress = silent,
) -> PriceTable:
    """Price every quantizable tensor in every type that the ladder holds it in, one slab of rows at a time.

    Raises SamqError for a tensor that the map or the fisher lacks, or that has another shape there.
    """
    for tensor in quantizable.values():
        _check(tensor, sensitivity, fisher)
    prices = {name: {tensor.type: Price(bytes=tensor.bytes, kl_nats=0.0)} for name, tensor in quantizable.items()}
    total = len(ladder.rungs) * len(quantizable)
    along, whole = defaultdict[str, float](float), defaultdict[str, float](float)  # <dW, W> and <W, W> of each type
    for done, rung in enumerate(ladder.rungs.values()):
        originals = {tensor.name: tensor for tensor in open_gguf(ladder.gguf).tensors}
        rounded = {tensor.name: tensor for tensor in open_gguf(rung).tensors}
        for index, (name, info) in enumerate(quantizable.items()):
            progress(done * len(quantizable) + index, total)
            kind = rounded[name].tensor_type.name
            if kind not in prices[name]:
                cost, error_along, squares = _rounding(originals[name], rounded[name], fisher[name])
                prices[name][kind] = Price(bytes=tensor_bytes(kind, info.shape), kl_nats=cost)
                along[kind] += error_along
                whole[kind] += squares
    progress(total, total)
    return PriceTable(
        gguf_sha256=gguf_sha256,
        map_digest=sensitivity.digest(),
        imatrix_sha256=imatrix_sha256,
        sequence_tokens=sensitivity.sequence_tokens,
        tensors={
            name: TensorPrices(types=types, shares=_shares(sensitivity.tensors[name].sequence_squares))
            for name, types in prices.items()
        },
        length_changes={kind: along[kind] / whole[kind] for kind in whole if whole[kind]},
    )


def plan_cost(prices: PriceTable, types: Mapping[str, str]) -> Metric:
    """Predicted KL of a plan, nats per token, with its standard error over the calibration sequences.

    The cost is a ratio, of what the sequences add to it over their label tokens; its error is the usual one of a ratio of
    means, with all tensors' errors taken together. Raises SamqError for a tensor or type that has no price.
    """
    costs = []
    for name, kind in types.items():
        if name not in prices.tensors or kind not in prices.tensors[name].types:
            raise SamqError(f"there is no price for {name} in {kind}; add that rung to the ladder")
        costs.append(prices.tensors[name].types[kind].kl_nats)
    tokens = np.array(prices.sequence_tokens)
    parts = np.array(costs) @ np.array([prices.tensors[name].shares for name in types])
    return Metric(value=math.fsum(costs), stderr=ratio_stderr(parts * tokens.sum(), tokens), n=len(tokens))


def ratio_stderr(costs: NDArray[np.float64], tokens: NDArray[np.int64]) -> float:
    """Standard error of sum(costs) / sum(tokens), both (sequences,): the usual one of a ratio of means."""
    count, total = len(costs), tokens.sum()
    residuals = costs - costs.sum() / total * tokens
    return float(np.sqrt(count / (count - 1) * np.square(residuals).sum()) / total)


def sequences_wanted(costs: Iterable[Metric], precision: float, *, measured: int, available: int) -> int:
    """How many calibration sequences to measure in all, for the relative standard error of every cost to be `precision`.

    The error of a mean falls with the square root of their number; a tenth more guards against bad luck in its estimate.
    `measured` if that is enough, or fewer than two are left: one alone has no standard error.
    """
    wanted = measured
    for cost in costs:
        relative = (cost.stderr or 0.0) / cost.value if cost.value else 0.0
        if relative > precision:
            wanted = max(wanted, math.ceil(1.1 * (cost.n or 0) * (relative / precision) ** 2))
    if wanted == measured or available - measured < 2:
        return measured
    return min(available, max(wanted, measured + 2))


def predicted_cost(prices: PriceTable, plan: Plan) -> Metric | None:
    """The plan's predicted KL; None if the ladder does not hold all of its types."""
    priced = all(kind in prices.tensors[name].types for name, kind in plan.types.items())
    return plan_cost(prices, plan.types) if priced else None


def lengthened(prices: PriceTable, plan: Plan) -> dict[str, float]:
    """The plan's types that lengthen weights by `LENGTHENING_LIMIT` or more, and by how much, relative."""
    changes = {kind: prices.length_changes.get(kind, 0.0) for kind in plan.types.values()}
    return {kind: changes[kind] for kind in sorted(changes) if changes[kind] >= LENGTHENING_LIMIT}


def _check(tensor: TensorInfo, sensitivity: SensitivityMap, fisher: Mapping[str, Fisher]) -> None:
    if tensor.name not in fisher or tensor.name not in sensitivity.tensors:
        raise SamqError(f"the sensitivity map has no Fisher information for {tensor.name}; calibrate this model again")
    if fisher[tensor.name].shape != tensor.shape:
        raise SamqError(
            f"the Fisher information of {tensor.name} is of {fisher[tensor.name].shape} weights, not {tensor.shape}; "
            "calibrate this model again"
        )


def _rounding(original: ReaderTensor, rounded: ReaderTensor, fisher: Fisher) -> tuple[float, float, float]:
    """Half of the sum of fisher times squared rounding error, in nats per token; and with dW that error, <dW, W> and <W, W>."""
    *_, rows, row_length = fisher.shape
    slab = max(1, _SLAB_WEIGHTS // row_length)
    cost = along = whole = 0.0
    experts = zip(fisher.rows.reshape(-1, rows), fisher.profile().reshape(-1, row_length), strict=True)
    for expert, (means, profile) in enumerate(experts):
        for first in range(0, rows, slab):
            here = slice(first, min(first + slab, rows))
            there = slice(expert * rows + here.start, expert * rows + here.stop)
            weights = read_rows(original, there)
            error = read_rows(rounded, there)
            error -= weights
            # einsum adds up in one order, whatever the number of threads
            along += math.fsum(np.einsum("ij,ij->i", error, weights))
            whole += math.fsum(np.einsum("ij,ij->i", weights, weights))
            np.square(error, out=error)
            cost += float(
                np.vdot(means[here].astype(np.float64), np.einsum("ij,j->i", error, profile).astype(np.float64))
            )
    return cost / 2, along, whole


def rounding_error(
    original: ReaderTensor, rounded: ReaderTensor, rows: slice | NDArray[np.intp]
) -> NDArray[np.float32]:
    """What quantization did to some rows: dequantized minus original, (rows, row length)."""
    error = read_rows(rounded, rows)
    error -= read_rows(original, rows)
    return error


def _shares(squares: Sequence[float]) -> tuple[float, ...]:
    """Each sequence's part of the sum; a tensor that no gradient reaches costs nothing, in equal parts."""
    total = sum(squares)
    return tuple(square / total for square in squares) if total else (1 / len(squares),) * len(squares)


def lengthening(changes: Mapping[str, float]) -> str:
    """Why rounding to these types, which lengthens weights by so much (relative), does more than is predicted."""
    types = " and ".join(f"{kind} lengthens weights by {100 * change:.1f} %" for kind, change in changes.items())
    return f"rounding to {types}, and errors of one sign add up where the prediction takes them for noise"
