"""Gradients of stacked experts, handed over some experts at a time.

A token's place in its batch says whose sequence's gradient its product belongs to. So batches may have several sequences.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from samq.errors import SamqError
from samq.sensitivity.experts import Product, TakeGradient, modules_of_experts, stack_names
from samq.sensitivity.layout import Weight
from samq.sensitivity.weight_gradients import ExpertGradients, Gradients, LinearGradients

KEPT_BYTES = 2**28  # of inputs and outputs' gradients, before they are handed over

# (the weight's index, number of the batch's first sequence, gradients of the batch's sequences, or of some rows of theirs)
Receive = Callable[[int, int, Gradients], None]


@dataclass(frozen=True)
class Batch:
    """The sequences that a backward pass is over."""

    first: int  # number of the first
    lengths: list[int]  # in tokens

    @property
    def longest(self) -> int:
        """What all are padded to."""
        return max(self.lengths)


@dataclass(frozen=True)
class _Part:
    """What a weight has of the matrices of a stack: numbers of their outputs (rows,) and inputs (row length,)."""

    index: int  # of the weight
    outputs: torch.Tensor
    inputs: torch.Tensor


class GradientsOfExperts:
    """Takes what backward passes give of each expert's product, and hands over the gradients."""

    def __init__(self, model: PreTrainedModel, weights: list[Weight], receive: Receive) -> None:
        self._weights, self._receive = weights, receive
        self._batch = Batch(0, [])
        self._parts = _parts(model, weights)
        self._kept: dict[int, list[tuple[int, LinearGradients]]] = defaultdict(list)  # weight -> experts' gradients
        self._kept_bytes = 0

    @property
    def indices(self) -> set[int]:
        """The weights whose gradients are handed over."""
        return {part.index for parts in self._parts.values() for part in parts}

    def begin(self, batch: Batch) -> None:
        """Say what the next pass is over."""
        self._batch = batch

    def clear(self) -> None:
        """Forget what was not handed over."""
        self._kept.clear()
        self._kept_bytes = 0

    @contextmanager
    def require_one_call(self, within: nn.Module) -> Iterator[None]:
        """Leave to autograd the experts of those modules that a forward pass calls several times: their gradients add up."""
        calls: dict[nn.Module, int] = defaultdict(int)

        def count(module: nn.Module, *_: object) -> None:
            calls[module] += 1

        inside = set(within.modules())
        modules = {module for module, _ in self._parts if module in inside}
        handles = [module.register_forward_pre_hook(count) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._parts = {key: parts for key, parts in self._parts.items() if calls[key[0]] <= 1}

    def see(self, product: Product, vectors: torch.Tensor) -> TakeGradient | None:
        """Note a product's input (T, in); gives what takes the gradient of its output."""
        parts = self._parts.get((product.module, product.name))
        if parts is None or not torch.is_grad_enabled():
            return None
        layer_input = vectors.detach()
        return lambda gradient: self._take(parts, product, layer_input, gradient)

    def _take(self, parts: list[_Part], product: Product, layer_input: torch.Tensor, gradient: torch.Tensor) -> None:
        inputs, outputs = self._by_sequence(product, layer_input, gradient)
        for part in parts:
            of_part = LinearGradients(
                inputs[..., part.inputs.to(inputs.device)], outputs[..., part.outputs.to(outputs.device)]
            )
            self._kept[part.index].append((product.expert, of_part))
            self._kept_bytes += of_part.inputs.nbytes + of_part.outputs.nbytes
        if self._kept_bytes > KEPT_BYTES:
            self.hand_over()

    def _by_sequence(
        self, product: Product, layer_input: torch.Tensor, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Input (sequences, T, in) and output's gradient (sequences, T, out): each sequence's tokens, and zeros after them."""
        batch, longest = len(self._batch.lengths), self._batch.longest
        if not gradient.is_cuda:
            layer_input, gradient = layer_input.float(), gradient.float()
        if batch == 1:
            return layer_input[None], gradient[None]
        if product.entering != batch * longest:
            raise SamqError(
                f"{type(product.module).__name__} mixes the tokens of several samples, so SAMQ cannot separate their gradients; "
                "measure with a batch size of 1"
            )
        sequences = product.tokens // longest
        counts = torch.bincount(sequences, minlength=batch)
        places = torch.arange(len(sequences), device=sequences.device) - (counts.cumsum(0) - counts)[sequences]
        longest_here = int(counts.max())
        padded = [vectors.new_zeros(batch, longest_here, vectors.shape[1]) for vectors in (layer_input, gradient)]
        for of_all, vectors in zip(padded, (layer_input, gradient), strict=True):
            of_all[sequences, places] = vectors
        return padded[0], padded[1]

    def hand_over(self) -> None:
        """Hand over what is kept."""
        for index in sorted(self._kept):
            gradients = ExpertGradients(self._weights[index].shape, self._kept[index])
            self._receive(index, self._batch.first, gradients)
        self.clear()


def _parts(model: PreTrainedModel, weights: list[Weight]) -> dict[tuple[nn.Module, str], list[_Part]]:
    """(module, name) of the stacks whose weights each have some outputs and inputs of a stack's matrices -> those."""
    by_parameter: dict[int, list[int]] = defaultdict(list)
    for index, weight in enumerate(weights):
        by_parameter[id(weight.parameter)].append(index)
    modules, parts = modules_of_experts(model), {}
    users: Mapping[int, int] = _counts(
        id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False)
    )
    for module in modules:
        for name in stack_names(module):
            stack = getattr(module, name)
            of_stack = [_part(weights[index], index, bool(module.is_transposed)) for index in by_parameter[id(stack)]]
            if of_stack and users[id(stack)] == 1 and None not in of_stack:
                parts[module, name] = [part for part in of_stack if part]
    return parts


def _counts(keys: Iterator[int]) -> dict[int, int]:
    counts: dict[int, int] = defaultdict(int)
    for key in keys:
        counts[key] += 1
    return counts


def _part(weight: Weight, index: int, is_transposed: bool) -> _Part | None:
    """What the weight has of a stack's matrices, as its view shows; None if that is no choice of outputs and inputs."""
    if weight.parameter.ndim != 3 or weight.view.rows is not None or weight.view.columns is not None:
        return None
    _, first, second = weight.parameter.shape
    numbers = torch.arange(first, dtype=torch.int32)[:, None].expand(first, second)
    others = torch.arange(second, dtype=torch.int32).expand(first, second)
    rows, columns = (weight.view(one[None])[0] for one in ((others, numbers) if is_transposed else (numbers, others)))
    if not (rows == rows[:, :1]).all() or not (columns == columns[:1]).all():
        return None
    return _Part(index, rows[:, 0].long(), columns[0].long())
