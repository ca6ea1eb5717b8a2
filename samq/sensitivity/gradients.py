"""Gradients of single samples in a batch, one weight at a time, each handed over and freed before the next is made.

Autograd adds the samples of a batch up and keeps a gradient for every weight. Here the weights are frozen; hooks keep
the input X (B, T, in) and the output gradient dY (B, T, out) of every linear layer, and the gradient of sample b is
dY[b]^T X[b], made in bands of rows. For an embedding the rows of dY are added up by token. What a weight gets from
several uses (a tied embedding and output) is added before it is handed over. Weights in other kinds of modules (GPT-2's
Conv1D, stacked experts) take autograd's gradient, and then a batch may hold only one sample.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from samq.errors import SamqError
from samq.sensitivity.layout import Weight

BAND_WEIGHTS = 2**22  # weights of one band of a gradient: 16 MiB in float32

# (weight's index, sample of the batch, first row, gradient of those rows in float32); stacked experts' rows follow
# one another, and come all at once. The gradient may be overwritten by the call, and after it.
Receive = Callable[[int, int, int, torch.Tensor], None]


class SampleGradients:
    """Hooks on a model for the time of a `with` block; `backward` then hands every sample's gradients to `receive`."""

    def __init__(self, model: PreTrainedModel, weights: list[Weight], receive: Receive) -> None:
        self.model = model
        self.weights = weights
        self.receive = receive
        self.lengths: list[int] = []
        # Of each hooked weight: its uses whose output gradient is still to come, and those whose is here.
        self._open: dict[int, int] = defaultdict(int)
        self._uses: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        self._hooked = self._hookable()

    @property
    def one_sample_only(self) -> bool:
        """Some weight needs autograd's own gradient, which cannot tell samples apart."""
        return len(self._hooked) < len(self.weights)

    def _hookable(self) -> dict[int, list[nn.Module]]:
        """Weight's index -> the modules that use it, for weights only linear layers and the token embedding use."""
        users: dict[int, list[nn.Module]] = defaultdict(list)
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                users[id(parameter)].append(module)
        embedding = self.model.get_input_embeddings()
        return {
            index: users[id(weight.parameter)]
            for index, weight in enumerate(self.weights)
            if all(
                type(module) is nn.Linear or (module is embedding and type(module) is nn.Embedding)
                for module in users[id(weight.parameter)]
            )
        }

    def __enter__(self) -> Self:
        """Freeze the model and hook its modules."""
        self._trainable = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        for parameter, _ in self._trainable:
            parameter.requires_grad_(False)
        self._handles: list[Any] = [
            module.register_forward_hook(partial(self._after_forward, index))
            for index, modules in self._hooked.items()
            for module in modules
        ]
        sharing: dict[nn.Parameter, list[int]] = defaultdict(list)
        for index, weight in enumerate(self.weights):
            if index not in self._hooked:
                sharing[weight.parameter].append(index)
        for parameter, indices in sharing.items():
            parameter.requires_grad_(True)
            self._handles.append(parameter.register_post_accumulate_grad_hook(partial(self._after_accumulate, indices)))
        return self

    def __exit__(self, *_: object) -> None:
        """Take the hooks off and leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        for parameter, trainable in self._trainable:
            parameter.requires_grad_(trainable)
            parameter.grad = None
        self._open.clear()
        self._uses.clear()

    def backward(self, logits: torch.Tensor, gradient: torch.Tensor, lengths: list[int]) -> None:
        """Run the backward pass from the logits' gradient (B, T, vocabulary), zero past each of the B lengths."""
        if self.one_sample_only and len(lengths) > 1:
            raise ValueError("this model's gradients are taken one sample at a time")
        self.lengths = lengths
        logits.backward(gradient)
        for index in list(self._uses):  # one of its uses took no part in the loss
            self._hand_over(index)
        self._open.clear()

    def _after_forward(
        self, index: int, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        if isinstance(module, nn.Embedding):
            output.requires_grad_(True)  # the root of the graph, as the weights are frozen
        if output.requires_grad:
            self._open[index] += 1
            output.register_hook(partial(self._after_backward, index, inputs[0].detach().to(output.device)))

    def _after_backward(self, index: int, entered: torch.Tensor, gradient: torch.Tensor) -> None:
        self._uses[index].append((entered, gradient.detach()))
        self._open[index] -= 1
        if self._open[index] == 0:
            self._hand_over(index)

    def _hand_over(self, index: int) -> None:
        uses = self._uses.pop(index)
        rows, columns = self.weights[index].shape
        band = max(1, BAND_WEIGHTS // columns)
        for sample in range(len(self.lengths)):
            parts = [self._of_sample(index, sample, *use) for use in uses]
            for first in range(0, rows, band):
                self.receive(index, sample, first, _band(parts, first, min(first + band, rows), columns))

    def _of_sample(
        self, index: int, sample: int, entered: torch.Tensor, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One sample's part of a use: what entered, tokens (T,) or (T, in), and the output's gradient (T, out)."""
        batch, longest = len(self.lengths), max(self.lengths)
        if gradient.shape[: 2 if gradient.ndim > 2 else 1] not in ((batch, longest), (batch * longest,)):
            if batch > 1:
                raise SamqError(
                    f"{self.weights[index].name} sees the tokens of several samples mixed, so their gradients cannot "
                    "be told apart; measure with a batch size of 1"
                )
            return entered.flatten(0, gradient.ndim - 2), gradient.flatten(0, -2).float()
        start = sample * longest
        # Past a sample's length the gradient is zero; cutting there saves the work.
        ours = slice(start, start + self.lengths[sample])
        return entered.flatten(0, gradient.ndim - 2)[ours], gradient.flatten(0, -2)[ours].float()

    def _after_accumulate(self, indices: list[int], parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        for index in indices:
            view = self.weights[index].view(gradient)
            self.receive(index, 0, 0, view.reshape(-1, view.shape[-1]).float())


def _band(parts: list[tuple[torch.Tensor, torch.Tensor]], first: int, last: int, columns: int) -> torch.Tensor:
    """Rows first..last of one sample's gradient, (last - first, columns), float32."""
    total = None
    for entered, gradient in parts:
        if entered.is_floating_point():
            turned, entered = gradient[:, first:last].t(), entered.float()
            total = turned @ entered if total is None else total.addmm_(turned, entered)
        else:
            if total is None:
                total = gradient.new_zeros(last - first, columns)
            inside = (entered >= first) & (entered < last)
            total.index_add_(0, entered[inside] - first, gradient[inside])
    assert total is not None
    return total
