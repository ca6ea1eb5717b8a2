"""Gradients of the single sequences of a batch, handed over for one weight at a time and freed before the next.

Autograd would add up the sequences of a batch and keep a gradient for every weight. Here the weights are frozen. Hooks keep
the input and the output's gradient of every linear layer and every embedding. When all uses of a layer in a backward pass are
known, they hand these over (`samq.sensitivity.weight_gradients`). Those of stacked experts are handed over some experts at a
time (`samq.sensitivity.expert_gradients`). Weights in other modules (GPT-2's Conv1D) take autograd's gradient. So do weights
that a model uses without calling their module, unless calls of `linear` alone use them, as routers do. Both limit a batch to
one sequence.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from samq.errors import SamqError
from samq.sensitivity.expert_gradients import Batch, GradientsOfExperts, Receive
from samq.sensitivity.experts import one_by_one
from samq.sensitivity.layout import Weight
from samq.sensitivity.offloading import computes_on, is_offloaded
from samq.sensitivity.weight_gradients import LinearGradients, RowGradients, WholeGradient, sum_of_rows
from samq.sensitivity.weight_uses import LinearCalls, observed, uses_of


class SampleGradients:
    """Hooks on a model during a `with` block, in which backward passes hand each weight's gradients to `receive`.

    A pass may be over the whole model or over a part of it. It has all uses of the part's weights, with one exception. If the
    embedding is the output as well, its two uses may come in two passes, the output's first.
    """

    def __init__(self, model: PreTrainedModel, weights: list[Weight], receive: Receive) -> None:
        self.model = model
        self.weights = weights
        self.receive = receive
        self._batch = Batch(0, [])
        # For each weight of linear layers: number of its uses without an output gradient so far, and the uses that have one.
        self._open: dict[int, int] = defaultdict(int)
        self._uses: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        # (weight, sequence) of a weight that is embedding and output -> input and gradient of the output at that sequence's
        # tokens. They are here until the embedding's gradient comes.
        self._tied: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._ids: dict[int, torch.Tensor] = {}  # weight -> token ids that the embedding saw last
        self._uses_of = uses_of(model, weights)
        self._of_experts = GradientsOfExperts(model, weights, receive)
        as_it_is = {index for index, weight in enumerate(weights) if weight.view.matrix is None}
        self._hooked = {
            index
            for index in as_it_is
            if all(_is_hookable(weights[index], module) for module, _ in self._uses_of[index])
        }
        # Weights of other modules, of routers for example, that calls of `linear` multiply by; until it is seen that they do not.
        self._multiplied = {
            index
            for index in as_it_is - self._hooked
            if weights[index].parameter.ndim == 2
            and not any(isinstance(module, nn.Embedding) for module, _ in self._uses_of[index])
        }

    def require_calls(self, run: Callable[[], object], within: nn.Module) -> None:
        """Take autograd's gradient of those weights of `within` that `run`, a forward pass, uses without their module."""
        inside = set(within.modules())
        uses = {
            index: of_weight
            for index, of_weight in enumerate(self._uses_of)
            if index in self._hooked | self._multiplied and all(module in inside for module, _ in of_weight)
        }
        with self._of_experts.require_one_call(within):
            without_call, linear = observed(uses, run)
        self._multiplied = (self._multiplied - uses.keys()) | (linear & (self._multiplied | without_call))
        self._hooked -= without_call

    @property
    def one_sample_only(self) -> bool:
        """Whether some weight needs autograd's own gradient, or is of an embedding of positions: both sum over sequences."""
        embedding = self.model.get_input_embeddings()
        return len(self._handed_over) < len(self.weights) or any(
            isinstance(module, nn.Embedding) and module is not embedding
            for index in self._hooked
            for module, _ in self._uses_of[index]
        )

    @property
    def _handed_over(self) -> set[int]:
        """The weights whose gradients are not autograd's."""
        return self._hooked | self._multiplied | self._of_experts.indices

    def not_hooked_outside(self, blocks: list[nn.Module]) -> str | None:
        """The name of a weight outside these blocks that takes autograd's gradient, if there is one."""
        inside = {module for block in blocks for module in block.modules()}
        names = (
            self.weights[index].name
            for index, uses in enumerate(self._uses_of)
            if index not in self._hooked | self._of_experts.indices and not all(module in inside for module, _ in uses)
        )
        return next(names, None)

    def linear_layers(self, part: nn.Module) -> list[nn.Linear]:
        """Those of a part of the model whose gradients come from hooks, and whose forward function is their own."""
        hooked = {module for index in self._hooked for module, _ in self._uses_of[index]}
        return [
            module
            for module in part.modules()
            if isinstance(module, nn.Linear) and module in hooked and _is_own_forward(module)
        ]

    def __enter__(self) -> Self:
        """Freeze the model and hook its modules."""
        self._watched = one_by_one(self.model, self._of_experts.see)
        self._watched.__enter__()
        self._trainable = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        for parameter, _ in self._trainable:
            parameter.requires_grad_(False)
        self._handles: list[Any] = [self.model.get_input_embeddings().register_forward_hook(_start_graph)]
        self._handles += [
            module.register_forward_hook(partial(self._after_forward, index))
            for index in self._hooked
            for module, _ in self._uses_of[index]
        ]
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks and restore the model."""
        self._watched.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        for parameter, trainable in self._trainable:
            parameter.requires_grad_(trainable)
            parameter.grad = None
        for kept in (self._open, self._uses, self._tied, self._ids):
            kept.clear()

    @contextmanager
    def within(self, part: nn.Module | None, batch: Batch) -> Iterator[Callable[[torch.Tensor, torch.Tensor], None]]:
        """Run forward and backward through a part of the model, or all of it; gives the function that runs backward.

        `part` has the weights that take autograd's gradient; None if there are none. The function takes the output of the
        forward pass and its gradient, which is zero past each sequence's length.
        """
        if self.one_sample_only and len(batch.lengths) > 1:
            raise ValueError("this model's gradients are taken one sequence at a time")
        self._batch = batch
        self._of_experts.begin(batch)
        watched = [] if part is None else self._watch(part)
        multiplied = (
            {}
            if part is None
            else {id(parameter): index for parameter, index in self._in_place(part, self._multiplied)}
        )
        calls = LinearCalls(multiplied, self._after_product) if multiplied else nullcontext()
        try:
            with calls:
                yield self._backward
        finally:
            for parameter, handle in watched:
                handle.remove()
                parameter.requires_grad_(False)
                parameter.grad = None
            self._open.clear()  # of a forward pass without its backward pass
            self._of_experts.clear()

    def pending(self) -> dict[str, torch.Tensor]:
        """What is kept of outputs tied to an embedding until the embedding's own pass."""
        return {
            f"tied.{index}.{sequence}.{place}": tensor
            for (index, sequence), parts in self._tied.items()
            for place, tensor in enumerate(parts)
        }

    def restore_pending(self, state: Mapping[str, torch.Tensor]) -> None:
        """Have what `pending` gave, in another process perhaps."""
        for name in state:
            if name.startswith("tied.") and name.endswith(".0"):
                index, sequence = map(int, name.split(".")[1:3])
                self._tied[index, sequence] = state[name], state[f"{name[:-1]}1"]

    def _watch(self, part: nn.Module) -> list[tuple[nn.Parameter, Any]]:
        """Let autograd take the gradient of those of the part's weights that are not hooked."""
        sharing: dict[Any, list[int]] = defaultdict(list)
        for parameter, index in self._in_place(part, set(range(len(self.weights))) - self._handed_over):
            sharing[parameter].append(index)
        handles = []
        for parameter, indices in sharing.items():
            parameter.requires_grad_(True)
            hook = partial(self._after_accumulate, indices)
            handles.append((parameter, parameter.register_post_accumulate_grad_hook(hook)))
        return handles

    def _in_place(self, part: nn.Module, indices: set[int]) -> Iterator[tuple[nn.Parameter, int]]:
        """What stands in the places of weights in a part of the model, perhaps copies on another device; each once."""
        inside = set(part.modules())
        for index in sorted(indices):
            for parameter in {getattr(module, name) for module, name in self._uses_of[index] if module in inside}:
                yield parameter, index

    def _backward(self, output: torch.Tensor, gradient: torch.Tensor) -> None:
        output.backward(gradient)
        for index in list(self._uses):  # the loss does not depend on one of the weight's uses
            self._hand_over(index)
        self._open.clear()
        self._of_experts.hand_over()

    def _after_forward(
        self, index: int, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> None:
        if index not in self._hooked:  # found out after the hooks were put on
            return
        layer_input = inputs[0].detach()
        if isinstance(module, nn.Embedding):
            self._ids[index] = layer_input
            if torch.is_grad_enabled() and not output.requires_grad:
                output.requires_grad_(True)
            if output.requires_grad:
                output.register_hook(partial(self._after_embedding, index, module, layer_input.to(output.device)))
        else:
            self._after_product(index, layer_input, output)

    def _after_product(self, index: int, layer_input: torch.Tensor, output: torch.Tensor) -> None:
        if output.requires_grad:
            self._open[index] += 1
            output.register_hook(partial(self._after_linear, index, layer_input.detach().to(output.device)))

    def _after_linear(self, index: int, layer_input: torch.Tensor, gradient: torch.Tensor) -> None:
        self._uses[index].append((layer_input, gradient.detach()))
        self._open[index] -= 1
        if self._open[index] == 0:
            self._hand_over(index)

    def _hand_over(self, index: int) -> None:
        parts = [self._by_sequence(index, *use) for use in self._uses.pop(index)]
        inputs, outputs = (torch.cat(part, dim=1) if len(part) > 1 else part[0] for part in zip(*parts, strict=True))
        if any(isinstance(module, nn.Embedding) for module, _ in self._uses_of[index]):
            outputs = self._without_rows_of_tokens(index, inputs, outputs)
        self.receive(index, self._batch.first, LinearGradients(inputs, outputs))

    def _by_sequence(
        self, index: int, layer_input: torch.Tensor, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A use's input (sequences, T, in) and output's gradient (sequences, T, out)."""
        batch, longest = len(self._batch.lengths), self._batch.longest
        if batch > 1 and tuple(size for size in gradient.shape[:-1] if size != 1) not in (
            (batch, longest),
            (batch * longest,),
        ):
            raise self._mixed(index)
        if batch == 1:
            longest = gradient[..., 0].numel()
        view = self.weights[index].view
        layer_input = layer_input.reshape(batch, longest, -1)
        gradient = gradient.reshape(batch, longest, -1)
        if not gradient.is_cuda:
            layer_input, gradient = layer_input.float(), gradient.float()
        if view.columns is not None:
            layer_input = layer_input[..., torch.from_numpy(view.columns).to(layer_input.device)]
        if view.rows is not None:
            gradient = gradient[..., torch.from_numpy(view.rows).to(gradient.device)]
        return layer_input, gradient

    def _without_rows_of_tokens(self, index: int, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """Keep for the embedding the output's gradient in those rows that it will have one for, and zero it here."""
        outputs = outputs.clone()
        for sample, (length, ids) in enumerate(zip(self._batch.lengths, self._ids[index], strict=True)):
            rows = ids[:length].unique().to(outputs.device)
            self._tied[index, self._batch.first + sample] = inputs[sample], outputs[sample, :, rows]
            outputs[sample, :, rows] = 0
        return outputs

    def _after_embedding(self, index: int, module: nn.Module, ids: torch.Tensor, gradient: torch.Tensor) -> None:
        lengths = self._batch.lengths
        if len(ids) != len(lengths):
            raise self._mixed(index)
        if (scale := getattr(module, "embed_scale", None)) is not None:
            gradient = gradient * torch.as_tensor(scale).to(gradient)
        for sample, length in enumerate(lengths):
            rows, sums = sum_of_rows(ids[sample, :length], gradient[sample, :length].detach())
            if (kept := self._tied.pop((index, self._batch.first + sample), None)) is not None:
                layer_input, of_output = (part.to(sums.device).float() for part in kept)
                sums.addmm_(of_output.t(), layer_input)
            rows_of_weight, columns = self.weights[index].shape
            gradients = RowGradients((rows_of_weight, columns), (sample, len(lengths)), rows, sums)
            self.receive(index, self._batch.first, gradients)

    def _mixed(self, index: int) -> SamqError:
        return SamqError(
            f"{self.weights[index].name} mixes the tokens of several samples, so SAMQ cannot separate their gradients; "
            "measure with a batch size of 1"
        )

    def _after_accumulate(self, indices: list[int], parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        for index in indices:
            self.receive(index, self._batch.first, WholeGradient(self.weights[index].view(gradient)))


def _is_own_forward(module: nn.Module) -> bool:
    """Whether the module's forward function is its class's, which accelerate puts back as an attribute of the module."""
    return getattr(module.forward, "__func__", None) is type(module).forward


def _is_hookable(weight: Weight, module: nn.Module) -> bool:
    """Whether the gradient of the module's weight follows from the module's input and its output's gradient."""
    if not isinstance(module, nn.Embedding):
        return type(module) is nn.Linear
    if weight.view.rows is not None:
        return False
    if type(module) is nn.Embedding:
        return True
    values = module._parameters["weight"]
    assert values is not None
    if is_offloaded(values):  # any values show it
        some = torch.arange(1, 1 + values.shape[1], device=computes_on(values)).to(values.dtype)
        module._parameters["weight"] = nn.Parameter(some.expand(values.shape), requires_grad=False)
    try:
        return _multiplies(module)
    finally:
        module._parameters["weight"] = values


@torch.no_grad()
def _multiplies(module: nn.Embedding) -> bool:
    """Whether it multiplies by a number, as Gemma's does."""
    ids = torch.arange(2, device=module.weight.device)
    scale = torch.as_tensor(getattr(module, "embed_scale", 1.0)).to(module.weight)
    return torch.equal(module(ids), nn.functional.embedding(ids, module.weight) * scale)


def _start_graph(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    """The weights are frozen, so autograd's graph starts with the embedding's output."""
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
