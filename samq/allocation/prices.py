"""Prices: the cost of each tensor in each type, in bytes and in predicted KL.

The rounding error dW is not modelled. Some rows at a time are rounded as llama-quantize rounds them, and the difference is
weighted and dropped (samq.gguf.nearest). Of a large tensor a sample of rows is taken (samq.allocation.price_rows). With the
Fisher information F (samq.sensitivity.fisher: means over rows and columns), a tensor in a type costs

    KL = sum over weights of F dW^2 / 2,  in nats per token,

which is the second-order term of the KL divergence without the terms between weights. The price of a plan is the sum over
its tensors.
"""

import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType, ReaderTensor
from numpy.typing import NDArray

from samq.allocation.price_rows import PricedRows, parts_to_price
from samq.allocation.target import OpenTarget
from samq.errors import SamqError
from samq.gguf.file import Rows, TensorInfo, mostly_unknown, read_rows
from samq.gguf.formats import UNMEASURED, fallback, smaller, tensor_bytes
from samq.gguf.ggml import to_float
from samq.gguf.imatrix import expert_tokens
from samq.gguf.nearest import NearestRounding
from samq.progress import Progress, silent
from samq.records import Metric, Plan, Price, PriceTable, SensitivityMap, TensorPrices
from samq.sensitivity.fisher import ENOUGH_TOKENS, Fisher, without_gradient

# A type that lengthens weights by this share or more costs more in a mixture than its prices say, since its errors have one
# sign. IQ3_S lengthens by 2 to 3 %, and no other type by a thousandth (benchmarks/low_bits.py). Shorter weights do not have
# this cost. Q3_K shortens by 1 % and Q2_K by 4 %, since a level is the mean of the weights that are rounded to it. Q3_K
# with its length restored is not better.
LENGTHENING_LIMIT = 0.01
# From this KL on, predicted or measured, rounding is no small change and second order fails.
SECOND_ORDER_LIMIT_NATS = 0.3


def price_table(
    target: OpenTarget,
    types: Mapping[str, Collection[str]],
    sensitivity: SensitivityMap,
    fisher: Mapping[str, Fisher],
    *,
    unmeasured: str = UNMEASURED,
    progress: Progress = silent,
) -> PriceTable:
    """Price every quantizable tensor in its own type and in the `types`, some rows at a time; a large one from a sample of rows.

    `types` maps tensor -> types that llama-quantize can write to it (`samq.allocation.types.legal_types`). A tensor that was
    not measured has only its own type and the type `unmeasured`, which seem to cost nothing. Raises SamqError if
    `sensitivity` or `fisher` lack most weights, or have one in another shape.
    """
    quantizable = target.quantizable
    measured = {name: tensor for name, tensor in quantizable.items() if name in sensitivity.tensors and name in fisher}
    if reason := mostly_unknown(quantizable, measured.keys()):
        raise SamqError(f"{reason}; give the sensitivities that `samq calibrate` measured on it")
    for tensor in measured.values():
        _check(tensor, fisher)
    prices = {name: {tensor.type: Price(bytes=tensor.bytes, kl_nats=0.0)} for name, tensor in quantizable.items()}
    for name in quantizable.keys() - measured.keys():
        kind = smaller(fallback(unmeasured, quantizable[name].row_length), quantizable[name].type)
        prices[name][kind] = Price(bytes=tensor_bytes(kind, quantizable[name].shape), kl_nats=0.0)
    rounding = _rounding_of(target, {name: types[name] for name in measured}, fisher, progress)
    for (name, kind), error in rounding.items():
        prices[name][kind] = Price(bytes=tensor_bytes(kind, quantizable[name].shape), kl_nats=error.cost / 2)
    sequences = {name: tensor.sequence_squares for name, tensor in sensitivity.tensors.items()}
    return PriceTable(
        gguf_sha256=target.full.sha256,
        map_digest=sensitivity.digest(),
        imatrix_sha256=target.imatrix.sha256 if target.imatrix else None,
        sequence_tokens=sensitivity.sequence_tokens,
        tensors={
            name: TensorPrices(types=kinds, shares=_shares(sequences.get(name, (0.0,) * sensitivity.samples)))
            for name, kinds in prices.items()
        },
        length_changes=_length_changes(rounding),
        scarce_experts=scarce_experts(target, fisher),
    )


def scarce_experts(target: OpenTarget, fisher: Mapping[str, Fisher]) -> dict[str, dict[int, int]]:
    """Tensor -> number of an expert -> its tokens, if they are too few; the importance matrix counts them, if there is one."""
    scarce = without_gradient(fisher)
    counted = expert_tokens(target.imatrix.path, target.quantizable) if target.imatrix else {}
    for name, tokens in counted.items():
        few = {int(expert): int(tokens[expert]) for expert in np.flatnonzero(tokens < ENOUGH_TOKENS)}
        scarce[name] = scarce.get(name, {}) | few
    return {name: experts for name, experts in scarce.items() if experts and name in target.quantizable}


@dataclass(frozen=True)
class _RoundingError:
    """Sums over weights w that are rounded to w + dw, with Fisher information f."""

    cost: float = 0.0  # f dw^2
    along_weights: float = 0.0  # dw w
    weight_squares: float = 0.0  # w^2

    def __add__(self, other: "_RoundingError") -> "_RoundingError":
        return _RoundingError(
            self.cost + other.cost,
            self.along_weights + other.along_weights,
            self.weight_squares + other.weight_squares,
        )


def _rounding_of(
    target: OpenTarget, types: Mapping[str, Collection[str]], fisher: Mapping[str, Fisher], progress: Progress
) -> dict[tuple[str, str], _RoundingError]:
    """(tensor, type) -> what rounding to the nearest values does; parts by several threads, summed in their order."""
    nearest = NearestRounding(target.full.path, target.imatrix.path if target.imatrix else None)
    parts = [part for name in types for part in parts_to_price(target.quantizable[name], fisher[name])]
    sums: dict[tuple[str, str], _RoundingError] = {}

    def round_part(part: PricedRows) -> dict[str, _RoundingError]:
        return _round_part(nearest, part, types[part.tensor], fisher[part.tensor])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="price") as threads:
        for done, (part, errors) in enumerate(zip(parts, threads.map(round_part, parts), strict=True)):
            progress(done, len(parts))
            for kind, error in errors.items():
                sums[part.tensor, kind] = sums.get((part.tensor, kind), _RoundingError()) + error
    progress(len(parts), len(parts))
    return sums


def _round_part(
    nearest: NearestRounding, part: PricedRows, kinds: Collection[str], fisher: Fisher
) -> dict[str, _RoundingError]:
    """Type -> the sums over a part, and over the rows that its rows stand for."""
    weights = nearest.weights(part.tensor, part.rows)
    profile = fisher.profile().reshape(-1, weights.shape[1])[part.expert]
    squares = math.fsum(
        np.einsum("ij,ij->i", weights, weights)
    )  # einsum adds up in the same order with any number of threads
    errors = {}
    for kind in kinds:
        blocks = nearest.rounded(part.tensor, kind, part.rows, weights)
        error = to_float(GGMLQuantizationType[kind], blocks, weights.shape[1])
        error -= weights
        along = math.fsum(np.einsum("ij,ij->i", error, weights))
        np.square(error, out=error)
        cost = float(np.vdot(part.fisher, np.einsum("ij,j->i", error, profile).astype(np.float64)))
        errors[kind] = _RoundingError(cost, part.stands_for * along, part.stands_for * squares)
    return errors


def _length_changes(rounding: Mapping[tuple[str, str], _RoundingError]) -> dict[str, float]:
    """Type -> the part of its errors along the weights, over all tensors that have it."""
    sums: dict[str, _RoundingError] = {}
    for (_, kind), error in rounding.items():
        sums[kind] = sums.get(kind, _RoundingError()) + error
    return {kind: error.along_weights / error.weight_squares for kind, error in sums.items() if error.weight_squares}


def plan_cost(prices: PriceTable, types: Mapping[str, str]) -> Metric:
    """Predicted KL of a plan in nats per token, with its standard error over the calibration sequences.

    `types` maps tensor -> type. The cost is a ratio: the sum of the sequences' parts over the sum of their label tokens. Its
    standard error is that of a ratio of means (`ratio_stderr`), from the parts of all tensors together. Raises SamqError for
    a tensor or type without a price.
    """
    costs = []
    for name, kind in types.items():
        if name not in prices.tensors or kind not in prices.tensors[name].types:
            raise SamqError(f"there is no price for {name} in {kind}; price that type as well")
        costs.append(prices.tensors[name].types[kind].kl_nats)
    tokens = np.array(prices.sequence_tokens)
    parts = np.array(costs) @ np.array([prices.tensors[name].shares for name in types])
    return Metric(value=math.fsum(costs), stderr=ratio_stderr(parts * tokens.sum(), tokens), n=len(tokens))


def ratio_stderr(costs: NDArray[np.float64], tokens: NDArray[np.int64]) -> float:
    """Standard error of sum(costs) / sum(tokens), both (sequences,), by linearization of the ratio of means."""
    count, total = len(costs), tokens.sum()
    residuals = costs - costs.sum() / total * tokens
    return float(np.sqrt(count / (count - 1) * np.square(residuals).sum()) / total)


def sequences_wanted(costs: Iterable[Metric], precision: float, *, measured: int, available: int) -> int:
    """The number of calibration sequences, in all, for which the relative standard error of every cost is `precision`.

    The error of a mean falls with the square root of the number. The result has a tenth more, since the estimate of the
    error is itself noisy. Returns `measured` if that is enough, or if fewer than two of the `available` sequences are left:
    a single one has no standard error.
    """
    count = measured
    for cost in costs:
        relative = (cost.stderr or 0.0) / cost.value if cost.value else 0.0
        if relative > precision:
            count = max(count, math.ceil(1.1 * (cost.n or 0) * (relative / precision) ** 2))
    if count == measured or available - measured < 2:
        return measured
    return min(available, max(count, measured + 2))


def predicted_cost(prices: PriceTable, plan: Plan) -> Metric | None:
    """The plan's predicted KL in nats per token; None if one of its types has no price."""
    has_prices = all(kind in prices.tensors[name].types for name, kind in plan.types.items())
    return plan_cost(prices, plan.types) if has_prices else None


def lengthened(prices: PriceTable, plan: Plan) -> dict[str, float]:
    """Type -> relative lengthening, for the plan's types that lengthen weights by `LENGTHENING_LIMIT` or more."""
    changes = {kind: prices.length_changes.get(kind, 0.0) for kind in plan.types.values()}
    return {kind: changes[kind] for kind in sorted(changes) if changes[kind] >= LENGTHENING_LIMIT}


def _check(tensor: TensorInfo, fisher: Mapping[str, Fisher]) -> None:
    if fisher[tensor.name].shape != tensor.shape:
        raise SamqError(
            f"the Fisher information of {tensor.name} is of {fisher[tensor.name].shape} weights, not {tensor.shape}; "
            "calibrate the model of this GGUF"
        )


def rounding_error(original: ReaderTensor, rounded: ReaderTensor, rows: Rows) -> NDArray[np.float32]:
    """The rounding error of some rows: dequantized minus original, (rows, row length)."""
    error = read_rows(rounded, rows)
    error -= read_rows(original, rows)
    return error


def _shares(squares: Sequence[float]) -> tuple[float, ...]:
    """Each sequence's share of the sum; equal shares for a tensor without gradients, which costs nothing."""
    total = sum(squares)
    return tuple(square / total for square in squares) if total else (1 / len(squares),) * len(squares)


def lengthening(changes: Mapping[str, float]) -> str:
    """Why rounding to these types, which lengthens weights by so much (relative), does more than is predicted."""
    types = " and ".join(f"{kind} lengthens weights by {100 * change:.1f} %" for kind, change in changes.items())
    return f"rounding to {types}, and errors of one sign add up where the prediction takes them for noise"
