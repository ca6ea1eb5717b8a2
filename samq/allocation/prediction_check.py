"""Check of a plan's predicted KL: its second-order cost, measured again on samples that did not choose the plan.

The prediction uses the samples that chose the plan. It approximates the Fisher information by means over rows and columns,
and leaves out the terms between weights. Let g be the gradient of a sequence's summed loss, with labels drawn from the
model, and dW the plan's rounding error. Three sums over a sequence's gradient estimate the plan's cost, each with more of
these terms:

    additive    sum over weights of g^2 dW^2 / 2
    by tensor   sum over tensors of <g, dW>^2 / 2, which includes the terms between the weights of a tensor
    joint       <g, dW>^2 / 2 over all tensors: the whole second-order term of the KL divergence

Each is divided by the sequences' label tokens, which gives nats per token. If `additive` exceeds the prediction, the plan
is overfitted to its own samples. If `joint` is far from `additive`, the errors of different weights add up or cancel. More
terms mean more noise, which the standard errors show. Do not choose a plan by these figures on the samples that gave them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import ReaderTensor
from numpy.typing import NDArray
from transformers import PreTrainedModel

from samq.allocation.prices import ratio_stderr, rounding_error
from samq.data.tokens import TokenBatch
from samq.errors import SamqError
from samq.gguf.file import open_gguf, read_tensors
from samq.progress import Progress, silent
from samq.records import Metric, Plan, PredictionCheck
from samq.sensitivity.backpropagation import backpropagate
from samq.sensitivity.layout import GgufLayout, Weight
from samq.sensitivity.loss import Labelling
from samq.sensitivity.memory import UNLIMITED, Memory
from samq.sensitivity.reduction import Reduced
from samq.sensitivity.weight_gradients import Gradients, Rows


@dataclass(frozen=True)
class RoundedPlan:
    """A plan, its predicted cost, and the GGUFs that its rounding errors are the difference of."""

    plan: Plan
    predicted: Metric  # by the price table, nats per token
    original: Path  # the full-precision GGUF
    rounded: Path  # the plan's GGUF


def check_prediction(
    model: PreTrainedModel,
    tokens: TokenBatch,
    candidate: RoundedPlan,
    layout: GgufLayout,
    *,
    batch_size: int = 1,
    seed: int = 0,
    memory: Memory = UNLIMITED,
    progress: Progress = silent,
) -> PredictionCheck:
    """Estimate a plan's KL from gradients on the sequences of `tokens`, in the three ways of the module's docstring.

    Args:
        model: the full-precision model, in any floating-point type, on any device.
        tokens: at least two sequences, for a standard error, and none of the calibration's.
        candidate: the plan and its GGUFs. The record keeps its predicted cost beside the others.
        layout: the model's weights as `candidate.original` has them.
        batch_size: sequences a pass, which changes the figures by rounding only. With a larger batch a weight is
            dequantized less often, and its rounding error stays in memory for the whole batch.
        seed: of the drawn labels, which differ from the calibration's with the same seed.
        memory: what it may use.
        progress: told of the blocks that are done, there and back.

    Raises:
        SamqError: too few sequences, a GGUF of another model or plan, or too little GPU memory. Also NaN or Inf in the GGUF,
            in a loss or in a gradient.
    """
    plan = candidate.plan
    if len(tokens) < 2:
        raise SamqError(f"the check of a prediction needs at least 2 sequences, not {len(tokens)}; give more text")
    errors = _RoundingErrors(layout, candidate)
    _, sums = backpropagate(
        model,
        tokens,
        layout.weights,
        errors.products,
        labelling=Labelling("model", seed, purpose="check"),
        batch_size=batch_size,
        memory=memory,
        progress=progress,
    )
    products, squares = np.moveaxis(sums.numbers(), -1, 0)
    label_tokens = tokens.lengths.astype(np.int64) - 1
    return PredictionCheck(
        plan=plan.name,
        plan_digest=plan.digest(),
        rounding=plan.rounding,
        samples=len(tokens),
        tokens=int(label_tokens.sum()),
        predicted=candidate.predicted,
        additive=_per_token(squares.sum(axis=0) / 2, label_tokens),
        by_tensor=_per_token((products**2).sum(axis=0) / 2, label_tokens),
        joint=_per_token(products.sum(axis=0) ** 2 / 2, label_tokens),
    )


def _per_token(costs: NDArray[np.float64], label_tokens: NDArray[np.int64]) -> Metric:
    """The sequences' costs per label token, with the standard error over sequences."""
    value = float(costs.sum() / label_tokens.sum())
    return Metric(value=value, stderr=ratio_stderr(costs, label_tokens), n=len(costs))


class _RoundingErrors:
    """A plan's rounding errors, read a few rows of one weight at a time when a gradient needs them."""

    def __init__(self, layout: GgufLayout, candidate: RoundedPlan) -> None:
        plan, rounded = candidate.plan, candidate.rounded
        self.weights = layout.weights
        self.rounded = rounded
        self._originals = _stored_tensors(layout.weights, candidate.original)
        self._rounded = _stored_tensors(layout.weights, rounded)
        self._cache: tuple[int, dict[int, torch.Tensor]] = -1, {}  # a weight's index, and its errors by first row
        in_gguf = read_tensors(candidate.original).keys()
        for name, kind in plan.types.items():
            if name not in self._rounded:
                if name in in_gguf:
                    continue  # it was not measured
                raise SamqError(f"plan {plan.name} names {name}, which the model in torch lacks; plan for this model")
            if self._rounded[name].tensor_type.name != kind:
                raise SamqError(
                    f"{name} is {self._rounded[name].tensor_type.name} in {rounded} and {kind} in plan {plan.name}; "
                    "give the GGUF that was made from the plan"
                )

    def products(self, index: int, gradients: Gradients) -> Reduced:
        """(<g, dW>, sum of g^2 dW^2) of each sequence, over the rows of one weight that the gradients have."""
        name = self.weights[index].name
        changed = self._rounded[name].tensor_type != self._originals[name].tensor_type
        sums = gradients.zeros(2)
        for sample, rows, gradient in gradients.bands() if changed else ():
            products = gradient.double() * self._errors(index, rows, gradient.device)
            sums[sample] += torch.stack([products.sum(), products.square_().sum()])
        return Reduced(sums)

    def _errors(self, index: int, rows: Rows, device: torch.device) -> torch.Tensor:
        """dW of some rows; a band's is cached for the batch's other sequences until another weight's are read."""
        if self._cache[0] != index:
            self._cache = index, {}
        first = rows.start if isinstance(rows, slice) else None
        if first is not None and first in self._cache[1]:
            return self._cache[1][first]
        name = self.weights[index].name
        some = rows if isinstance(rows, slice) else rows.cpu().numpy()
        errors = rounding_error(self._originals[name], self._rounded[name], some)
        if not np.isfinite(errors).all():
            raise SamqError(f"{name} in {self.rounded} holds NaN or Inf; quantize the model again")
        on_device = torch.from_numpy(errors).to(device)
        if first is not None:
            self._cache[1][first] = on_device
        return on_device


def _stored_tensors(weights: list[Weight], gguf: Path) -> dict[str, ReaderTensor]:
    """GGUF name -> the GGUF's tensor, for every weight; raises SamqError if one is missing or has another shape."""
    shapes = {name: tensor.shape for name, tensor in read_tensors(gguf).items()}
    for weight in weights:
        if shapes.get(weight.name) != weight.shape:
            raise SamqError(
                f"{weight.name} is {weight.shape} in torch, but {gguf} has {shapes.get(weight.name, 'no such tensor')}; "
                "give the GGUF that was made from this model"
            )
    names = {weight.name for weight in weights}
    return {tensor.name: tensor for tensor in open_gguf(gguf).tensors if tensor.name in names}
