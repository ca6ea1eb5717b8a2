"""How far a plan's predicted KL can be trusted: its second-order cost again, on samples that did not choose the plan.

A prediction comes from the samples by which the plan was chosen, averages the Fisher information over blocks of weights,
and leaves out the terms between weights. With g the gradient of a sequence's summed loss, its labels drawn from the model,
and dW what quantization did to the weights, three sums over a sequence's gradient, each holding more of those terms,
estimate what the plan costs:

    additive    sum over weights of g^2 dW^2 / 2
    by tensor   sum over tensors of <g, dW>^2 / 2, the terms between the weights of a tensor included
    joint       <g, dW>^2 / 2 over all tensors: the whole second-order term of the KL divergence

all over the sequences' label tokens, in nats per token. Additive over the prediction means that the plan fits its own
samples; joint far from additive, that errors of different weights add up or cancel. The more terms, the more noise: the
standard errors say how much. No plan is to be chosen by these figures on the samples that gave them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from samq.allocation.prices import ratio_stderr, rounding_error
from samq.data.tokens import TokenBatch
from samq.errors import SamqError
from samq.progress import Progress, silent
from samq.records import Metric, Plan, PredictionCheck
from samq.sensitivity.backpropagation import backpropagate
from samq.sensitivity.gradients import BAND_WEIGHTS
from samq.sensitivity.layout import Weight, stored_tensors, weights_of


def check_prediction(
    model: PreTrainedModel,
    tokens: TokenBatch,
    plan: Plan,
    predicted: Metric,
    *,
    names: Callable[[str], str | None],
    original: Path,
    rounded: Path,
    row_orders: Mapping[str, np.ndarray],
    batch_size: int = 1,
    seed: int = 0,
    progress: Progress = silent,
) -> PredictionCheck:
    """Estimate a plan's KL from gradients on the sequences of `tokens`, in three ways; see the module's text.

    Args:
        model: the full-precision model, in any floating type, on any device.
        tokens: at least two sequences, for a standard error; none that the calibration took.
        plan: whose types `rounded` has.
        predicted: the plan's cost by the price table, nats per token; only kept beside the others.
        names: torch's parameter name -> GGUF's, see `samq.gguf.file.gguf_names`.
        original: the full-precision GGUF.
        rounded: the plan's GGUF.
        row_orders: of `original`, see `samq.sensitivity.layout.row_orders`.
        batch_size: sequences a pass; the figures do not depend on it but for rounding. With more, a weight is dequantized
            less often, and its rounding error stays in memory for a whole batch.
        seed: of the drawn labels, which are others than the calibration's with the same seed.
        progress: told of sequences done.

    Raises:
        SamqError: too few sequences, a GGUF of another model or plan, NaN or Inf in it, in a loss or in a gradient, or
            too little GPU memory.
    """
    if len(tokens) < 2:
        raise SamqError(f"the check of a prediction needs at least 2 sequences, not {len(tokens)}; give more text")
    weights = weights_of(model, names)
    errors = _RoundingErrors(weights, plan, original, rounded, row_orders)
    _, sums = backpropagate(
        model,
        tokens,
        weights,
        errors.products,
        numbers=2,
        labels="model",
        # The key gives streams that no (seed, sequence) of the calibration has.
        stream=lambda sequence: np.random.default_rng(np.random.SeedSequence((seed, sequence), spawn_key=(1,))),
        text="check",
        batch_size=batch_size,
        progress=progress,
    )
    products, squares = sums[..., 0], sums[..., 1]
    label_tokens = tokens.lengths.astype(np.int64) - 1
    return PredictionCheck(
        plan=plan.name,
        plan_digest=plan.digest(),
        rounding=plan.rounding,
        samples=len(tokens),
        tokens=int(label_tokens.sum()),
        predicted=predicted,
        additive=_per_token(squares.sum(axis=0) / 2, label_tokens),
        by_tensor=_per_token((products**2).sum(axis=0) / 2, label_tokens),
        joint=_per_token(products.sum(axis=0) ** 2 / 2, label_tokens),
    )


def _per_token(costs: NDArray[np.float64], label_tokens: NDArray[np.int64]) -> Metric:
    """Sequences' costs over their label tokens, with the standard error over sequences."""
    value = float(costs.sum() / label_tokens.sum())
    return Metric(value=value, stderr=ratio_stderr(costs, label_tokens), n=len(costs))


class _RoundingErrors:
    """What a plan's quantization did to the weights, read when a gradient comes, a few rows of one weight at a time."""

    def __init__(
        self, weights: list[Weight], plan: Plan, original: Path, rounded: Path, row_orders: Mapping[str, np.ndarray]
    ) -> None:
        self.weights = weights
        self.rounded = rounded
        self._originals = stored_tensors(weights, original)
        self._rounded = stored_tensors(weights, rounded)
        # GGUF's row of each of torch's.
        self._rows = {name: np.argsort(order) for name, order in row_orders.items()}
        self._kept: tuple[int, dict[int, torch.Tensor]] = -1, {}  # a weight's index, and its errors by first row
        for name, kind in plan.types.items():
            if name not in self._rounded:
                raise SamqError(f"plan {plan.name} names {name}, which the model in torch lacks; plan for this model")
            if self._rounded[name].tensor_type.name != kind:
                raise SamqError(
                    f"{name} is {self._rounded[name].tensor_type.name} in {rounded} and {kind} in plan {plan.name}; "
                    "give the GGUF that was made from the plan"
                )

    def products(self, index: int, row: int, gradient: torch.Tensor) -> torch.Tensor:
        """(<g, dW>, sum of g^2 dW^2) over some rows of one weight."""
        name = self.weights[index].name
        sums = torch.zeros(2, dtype=torch.float64, device=gradient.device)
        if self._rounded[name].tensor_type == self._originals[name].tensor_type:
            return sums
        step = max(1, BAND_WEIGHTS // gradient.shape[1])
        for first in range(0, len(gradient), step):
            part = gradient[first : first + step]
            products = part.double() * self._errors(index, row + first, len(part), gradient.device)
            sums += torch.stack([products.sum(), products.square_().sum()])
        return sums

    def _errors(self, index: int, row: int, count: int, device: torch.device) -> torch.Tensor:
        """dW of some rows, in torch's order; kept until another weight's are wanted, for the batch's other sequences."""
        if self._kept[0] != index:
            self._kept = index, {}
        kept = self._kept[1]
        if row not in kept:
            name = self.weights[index].name
            here = slice(row, row + count)
            rows = self._rows[name][here] if name in self._rows else here
            errors = rounding_error(self._originals[name], self._rounded[name], rows)
            if not np.isfinite(errors).all():
                raise SamqError(f"{name} in {self.rounded} holds NaN or Inf; quantize the model again")
            kept[row] = torch.from_numpy(errors).to(device)
        return kept[row]
