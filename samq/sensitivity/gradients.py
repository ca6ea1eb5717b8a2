"""Gradients of the single samples of a batch, computed for one weight at a time and freed before the next.

Autograd would add up the samples of a batch and keep a gradient for every weight. Here the weights are frozen. Hooks keep
the input X (B, T, in) and the output's gradient dY (B, T, out) of every linear layer, and the gradient of sample b is
dY[b]^T X[b], computed in bands of rows. For an embedding the rows of dY are added up by token. If a weight is used several
times (a tied embedding and output), the gradients of its uses are added first. Weights in other kinds of modules (GPT-2's
Conv1D, stacked experts), and those that a model uses without calling their module (Mamba's dt_proj), take autograd's
gradient, which limits a batch to one sample.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from samq.errors import SamqError
from samq.sensitivity.layout import Weight

PROBE_TOKENS = 8  # of the forward pass that shows how weights are used
BAND_WEIGHTS = 2**22  # weights of one band of a gradient: 16 MiB in float32

# (the weight's index, sample of the batch, first row, gradient of those rows in float32). The rows of stacked experts are
# numbered through and come all at once. The call may overwrite the gradient, and so may whatever follows it.
Receive = Callable[[int, int, int, torch.Tensor], None]


class SampleGradients:
    """Hooks on a model during a `with` block, in which `backward` passes each sample's gradients to `receive`."""

    def __init__(self, model: PreTrainedModel, weights: list[Weight], receive: Receive) -> None:
        self.model = model
        self.weights = weights
        self.receive = receive
        self.lengths: list[int] = []
        # For each hooked weight: the number of its uses without an output gradient so far, and the uses that have one.
        self._open: dict[int, int] = defaultdict(int)
        self._uses: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        self._hooked = self._hookable()

    @property
    def one_sample_only(self) -> bool:
        """Whether some weight needs autograd's own gradient, which is a sum over the samples."""
        return len(self._hooked) < len(self.weights)

    def _hookable(self) -> dict[int, list[nn.Module]]:
        """Index of a weight -> the modules that use it, if they all are linear layers or the token embedding."""
        users: dict[int, list[nn.Module]] = defaultdict(list)
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                users[id(parameter)].append(module)
        embedding = self.model.get_input_embeddings()
        linear = {
            index: [weight.user] if weight.user is not None else users[id(weight.parameter)]
            for index, weight in enumerate(self.weights)
            if weight.view.matrix is None
            and all(
                type(module) is nn.Linear
                or (module is embedding and type(module) is nn.Embedding and weight.view.rows is None)
                for module in users[id(weight.parameter)]
            )
        }
        bypassed = _used_without_a_call(self.model, [self.weights[index].parameter for index in linear], users)
        return {
            index: modules for index, modules in linear.items() if id(self.weights[index].parameter) not in bypassed
        }

    def __enter__(self) -> Self:
        """Freeze the model and hook its modules."""
        self._trainable = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        for parameter, _ in self._trainable:
            parameter.requires_grad_(False)
        self._handles: list[Any] = [self.model.get_input_embeddings().register_forward_hook(_start_graph)]
        self._handles += [
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
        """Remove the hooks and restore the model."""
        for handle in self._handles:
            handle.remove()
        for parameter, trainable in self._trainable:
            parameter.requires_grad_(trainable)
            parameter.grad = None
        self._open.clear()
        self._uses.clear()

    def backward(self, logits: torch.Tensor, gradient: torch.Tensor, lengths: list[int]) -> None:
        """Run the backward pass from the logits' gradient (B, T, vocabulary), which is zero past each sample's length."""
        if self.one_sample_only and len(lengths) > 1:
            raise ValueError("this model's gradients are taken one sample at a time")
        self.lengths = lengths
        logits.backward(gradient)
        for index in list(self._uses):  # the loss does not depend on one of the weight's uses
            self._hand_over(index)
        self._open.clear()

    def _after_forward(
        self, index: int, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        if output.requires_grad:
            self._open[index] += 1
            output.register_hook(partial(self._after_backward, index, inputs[0].detach().to(output.device)))

    def _after_backward(self, index: int, layer_input: torch.Tensor, gradient: torch.Tensor) -> None:
        self._uses[index].append((layer_input, gradient.detach()))
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
        self, index: int, sample: int, layer_input: torch.Tensor, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One sample's part of a use: the input, token ids (T,) or (T, in), and the output's gradient (T, out)."""
        batch, longest = len(self.lengths), max(self.lengths)
        if gradient.shape[: 2 if gradient.ndim > 2 else 1] not in ((batch, longest), (batch * longest,)):
            if batch > 1:
                raise SamqError(
                    f"{self.weights[index].name} mixes the tokens of several samples, so SAMQ cannot separate their "
                    "gradients; measure with a batch size of 1"
                )
            here = slice(None)
        else:  # past a sample's length the gradient is zero, so the padding is cut off
            here = slice(sample * longest, sample * longest + self.lengths[sample])
        view = self.weights[index].view
        layer_input, gradient = layer_input.flatten(0, gradient.ndim - 2)[here], gradient.flatten(0, -2)[here].float()
        if view.columns is not None:
            layer_input = layer_input[:, torch.from_numpy(view.columns).to(layer_input.device)]
        if view.rows is not None:
            gradient = gradient[:, torch.from_numpy(view.rows).to(gradient.device)]
        return layer_input, gradient

    def _after_accumulate(self, indices: list[int], parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        for index in indices:
            view = self.weights[index].view(gradient)
            self.receive(index, 0, 0, view.reshape(-1, view.shape[-1]).float())


class _Uses(TorchFunctionMode):
    """Counts, while it is on, the torch functions that each of some parameters is an argument of."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.counts = {id(parameter): 0 for parameter in parameters}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") != "__get__":  # .shape, .dtype, .device
            for argument in (*args, *kwargs.values()):
                if id(argument) in self.counts:
                    self.counts[id(argument)] += 1
        return function(*args, **kwargs)


def _used_without_a_call(
    model: PreTrainedModel, parameters: list[nn.Parameter], users: Mapping[int, list[nn.Module]]
) -> set[int]:
    """Ids of the parameters that a forward pass uses more often than it calls their modules, which hooks would not see."""
    calls = {id(parameter): 0 for parameter in parameters}

    def count(parameter: int, *_: object) -> None:
        calls[parameter] += 1

    handles = [
        module.register_forward_pre_hook(partial(count, parameter))
        for parameter in calls
        for module in users[parameter]
    ]
    try:
        with torch.no_grad(), _Uses(parameters) as uses:
            model(input_ids=torch.arange(PROBE_TOKENS, device=model.device)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {parameter for parameter, count in uses.counts.items() if count > calls[parameter]}


def _start_graph(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    """The weights are frozen, so autograd's graph starts with the embedding's output."""
    output.requires_grad_(True)


def _band(parts: list[tuple[torch.Tensor, torch.Tensor]], first: int, last: int, columns: int) -> torch.Tensor:
    """Rows `first` to `last` (exclusive) of one sample's gradient, float32 (last - first, columns)."""
    total = None
    for layer_input, gradient in parts:
        if layer_input.is_floating_point():
            transposed, layer_input = gradient[:, first:last].t(), layer_input.float()
            total = transposed @ layer_input if total is None else total.addmm_(transposed, layer_input)
        else:
            if total is None:
                total = gradient.new_zeros(last - first, columns)
            inside = (layer_input >= first) & (layer_input < last)
            total.index_add_(0, layer_input[inside] - first, gradient[inside])
    assert total is not None
    return total
