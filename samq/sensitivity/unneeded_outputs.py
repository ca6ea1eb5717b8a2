"""Linear layers of a block whose outputs the way back does not need.

When a block is computed again for its gradients (`samq.sensitivity.block_pass`), the values of its last layers are often not
needed. A Llama's `down_proj` is only added to the hidden states, and the gradient of a sum needs neither term. Values show
which layers those are, and no architecture is named here. Such a layer may give NaN, and no NaN gets into what the gradients
are computed from. From then on it gives NaN, so that a use of its output would show.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

Run = Callable[[], object]  # a forward pass


def unneeded(layers: Sequence[nn.Linear], run: Run, expected: Sequence[nn.Linear] | None = None) -> list[nn.Linear]:
    """Those of the layers whose outputs do not reach what the backward pass of `run` would use, all of them together.

    If the `expected` ones are, perhaps none, no others are looked for. Layers that `run` does not call are needed.
    """
    if expected is not None and not expected:
        return []
    called = _called(layers, run)
    if expected and set(expected) <= set(called) and not _reaches_gradients(expected, layers, run):
        return list(expected)
    not_needed: list[nn.Linear] = []
    for layer in reversed(called):
        if not _reaches_gradients([*not_needed, layer], layers, run):
            not_needed.append(layer)
    return not_needed


@contextmanager
def without_outputs(layers: Sequence[nn.Linear]) -> Iterator[None]:
    """Let the layers return NaN, with the gradients that they have."""
    with ExitStack() as stack:
        for layer in layers:
            own = {name: value for name, value in layer.__dict__.items() if name == "forward"}
            layer.__dict__["forward"] = partial(_forward, layer)
            stack.callback(layer.__dict__.update, own)
            stack.callback(layer.__dict__.pop, "forward")
        yield


def _forward(layer: nn.Linear, layer_input: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = _WithoutOutput.apply(layer_input, layer.weight)  # type: ignore[no-untyped-call]
    return output


class _WithoutOutput(torch.autograd.Function):
    """A linear layer but for the values of its output."""

    @staticmethod
    def forward(ctx: Any, layer_input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return layer_input.new_full((*layer_input.shape[:-1], len(weight)), float("nan"))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight, None


def _called(layers: Sequence[nn.Linear], run: Run) -> list[nn.Linear]:
    """The layers that `run` calls, in the order of their first calls."""
    called: dict[nn.Linear, None] = {}
    with _before_each(layers, lambda layer, _: called.setdefault(layer)):
        run()
    return list(called)


def _reaches_gradients(some: Sequence[nn.Linear], layers: Sequence[nn.Linear], run: Run) -> bool:
    """Whether NaN from some of the layers gets into what autograd keeps of `run`, or into the input of one of the layers."""
    broken: list[torch.Tensor] = []
    weights = {layer.weight.untyped_storage().data_ptr() for layer in layers}

    def look(tensor: torch.Tensor) -> None:  # and keep nothing: a node that kept its own output would be a cycle
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in weights:
            broken.append(tensor.detach().isnan().any())

    def no_backward_pass(_: None) -> torch.Tensor:
        raise AssertionError("it is tried forward alone")

    with (
        _before_each(layers, lambda _, layer_input: look(layer_input)),
        without_outputs(some),
        torch.autograd.graph.saved_tensors_hooks(look, no_backward_pass),
    ):
        run()
    return any(map(bool, broken))


@contextmanager
def _before_each(layers: Sequence[nn.Linear], look: Callable[[nn.Linear, torch.Tensor], object]) -> Iterator[None]:
    """Look at each call of the layers, with its input."""

    def hook(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        look(layer, inputs[0])

    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
