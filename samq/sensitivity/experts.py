"""Stacked experts of a mixture, computed one after the other.

transformers computes a module of experts by one of several functions, and takes others (`ALL_EXPERTS_FUNCTIONS`). The function
here multiplies each expert's matrices by the tokens that are routed to that expert. So a matrix may be elsewhere until its
product, whoever measures inputs or gradients is told of each product, and no gradient has the size of the whole stack.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

_NAME = "samq_one_by_one"
_WATCH = "samq_watch"  # attribute of a module of experts, while somebody watches it
_SOURCE = "samq_source"  # attribute of a parameter that stands for a stack which is elsewhere


@dataclass(frozen=True)
class Product:
    """The product of one expert's matrix and the tokens that are routed to it."""

    module: nn.Module
    name: str  # of the stack, a parameter of the module
    expert: int
    tokens: torch.Tensor  # (T,) their numbers among the tokens that enter the module, in order
    entering: int  # how many tokens enter the module


TakeGradient = Callable[[torch.Tensor], None]
# (product, its input (T, in)) -> what takes the gradient (T, out) of its output, or None
Watch = Callable[[Product, torch.Tensor], TakeGradient | None]


class Source(Protocol):
    """Where a stack is whose matrices are fetched one at a time."""

    def fetch(self, expert: int) -> Callable[[], torch.Tensor]:
        """Begin to fetch the matrix of an expert; gives the function that waits for it."""


def stands_for(parameter: nn.Parameter, source: Source) -> None:
    """Let the experts' matrices come from the source."""
    setattr(parameter, _SOURCE, source)


def is_elsewhere(parameter: torch.Tensor) -> bool:
    """Whether the parameter only stands for a stack of experts."""
    return hasattr(parameter, _SOURCE)


def modules_of_experts(model: nn.Module) -> list[nn.Module]:
    """The modules that are computed here while `one_by_one` is on."""
    return [
        module for module in model.modules() if hasattr(module, "_is_expert_parallel")
    ]  # set by transformers' decorator


def stack_names(module: nn.Module) -> tuple[str, str]:
    """The names of the stacks of a module of experts, in the order in which they are used."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def stacks(part: nn.Module) -> list[nn.Parameter]:
    """The stacks of a part of a model."""
    return [getattr(module, name) for module in modules_of_experts(part) for name in stack_names(module)]


@contextmanager
def one_by_one(model: PreTrainedModel, watch: Watch | None = None) -> Iterator[None]:
    """Compute experts one after the other, and tell `watch` of each product before it is computed."""
    modules = modules_of_experts(model)
    configurations: dict[int, Any] = {id(module.config): module.config for module in modules}
    before = {key: config._experts_implementation for key, config in configurations.items()}
    watches = [getattr(module, _WATCH, None) for module in modules]
    for module in modules:
        setattr(module, _WATCH, watch or getattr(module, _WATCH, None))
    for config in configurations.values():
        config._experts_implementation_internal = _NAME
    try:
        yield
    finally:
        for key, config in configurations.items():
            config._experts_implementation_internal = before[key]
        for module, watched in zip(modules, watches, strict=True):
            setattr(module, _WATCH, watched)


def _compute(module: nn.Module, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """The sum of each token's experts, (tokens, width); `chosen` and `shares` have their numbers and factors, (tokens, K)."""
    settings: Any = module
    of_token, experts = chosen.shape[-1], settings.num_experts
    order = torch.argsort(chosen.flatten(), stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=experts).tolist()
    counts, left = counts[:experts], sum(counts[experts:])  # numbers past the last expert stand for none
    tokens = order // of_token
    up, down = stack_names(module)
    used = [expert for expert, count in enumerate(counts) if count]
    matrices = _Matrices(module, [(name, expert) for expert in used for name in (up, down)], len(hidden))
    parts = []
    vectors = hidden[tokens].split([*counts, left])
    firsts = list(accumulate(counts, initial=0))
    for place, expert in enumerate(used):
        routed = tokens[firsts[expert] : firsts[expert + 1]]
        inner = matrices.times(2 * place, vectors[expert], routed)
        inner = settings._apply_gate(inner) if settings.has_gate else settings.act_fn(inner)
        parts.append(matrices.times(2 * place + 1, inner, routed))
    if left:
        parts.append(torch.zeros_like(vectors[-1]))
    outputs = torch.cat(parts)
    if settings.has_post_expert_norm:
        outputs = settings.post_expert_norm(outputs)
    outputs = outputs * shares.flatten()[order].unsqueeze(-1)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return outputs[places].view(len(hidden), of_token, -1).sum(dim=1).to(hidden.dtype)


class _Matrices:
    """The matrices that a module uses in one pass, in that order: each comes when it is used, and the next one meanwhile."""

    def __init__(self, module: nn.Module, order: list[tuple[str, int]], entering: int) -> None:
        self._module, self._order, self._entering = module, order, entering
        self._coming: dict[int, Callable[[], torch.Tensor]] = {}

    def times(self, number: int, vectors: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The product of a matrix and (T, in), with its bias."""
        name, expert = self._order[number]
        watch: Watch | None = getattr(self._module, _WATCH, None)
        take = watch(Product(self._module, name, expert, tokens, self._entering), vectors) if watch else None
        output: torch.Tensor = _Multiply.apply(vectors, self, number, take)  # type: ignore[no-untyped-call]
        return output + getattr(self._module, f"{name}_bias")[expert] if self._module.has_bias else output

    def matrix(self, number: int, step: int) -> torch.Tensor:
        """A matrix, (out, in); fetches the one `step` places on meanwhile."""
        fetched = self._coming.pop(number, None) or self._fetch(number)
        following = number + step
        if 0 <= following < len(self._order) and following not in self._coming:
            self._coming[following] = self._fetch(following)
        return fetched().mT if self._module.is_transposed else fetched()

    def _fetch(self, number: int) -> Callable[[], torch.Tensor]:
        name, expert = self._order[number]
        stack: nn.Parameter = getattr(self._module, name)
        source: Source | None = getattr(stack, _SOURCE, None)
        return source.fetch(expert) if source else lambda: stack[expert]


class _Multiply(torch.autograd.Function):
    """A product whose matrix is fetched again for the way back, and whose output's gradient is handed over."""

    @staticmethod
    def forward(
        ctx: Any, vectors: torch.Tensor, matrices: _Matrices, number: int, take: TakeGradient | None
    ) -> torch.Tensor:
        ctx.of = matrices, number, take
        return vectors @ matrices.matrix(number, 1).mT

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        matrices, number, take = ctx.of
        if take:
            take(gradient)
        return gradient @ matrices.matrix(number, -1), None, None, None


ALL_EXPERTS_FUNCTIONS.register(_NAME, _compute)
