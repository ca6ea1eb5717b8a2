"""What decoder blocks are called with, as the model's own forward function calls them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


class NotApart(Exception):
    """Why a model does not come apart into blocks."""


class _Hidden:
    """Stands for the hidden states among a block's arguments."""


@dataclass(frozen=True)
class Call:
    """A block's arguments but for its hidden states, as the model's own forward function gives them."""

    positional: tuple[Any, ...]
    named: dict[str, Any]

    def filled(self, hidden: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with these hidden states, on their device."""

        moved: dict[int, torch.Tensor] = {}

        def fill(value: Any) -> Any:
            return hidden if isinstance(value, _Hidden) else _moved(value, hidden.device, moved)

        return tuple(map(fill, self.positional)), {name: fill(value) for name, value in self.named.items()}


@dataclass(frozen=True)
class Entered:
    """What a batch is at the first block: hidden states (sequences, T, width), and each block's other arguments."""

    hidden: torch.Tensor
    calls: list[Call]

    def on(self, device: torch.device) -> "Entered":
        """The same on a device; what several blocks are given is copied once."""
        moved: dict[int, torch.Tensor] = {}
        return Entered(
            self.hidden.to(device),
            [Call(_moved(call.positional, device, moved), _moved(call.named, device, moved)) for call in self.calls],
        )


@contextmanager
def replaced(
    layers: list[nn.Module], replace: Callable[[int, torch.Tensor, Call], torch.Tensor], outputs: int
) -> Iterator[None]:
    """Let calls of the blocks return what `replace(number, hidden, call)` gives.

    Raises NotApart if they are called in another order, or with something else than what the block before has returned.
    """
    returned: list[torch.Tensor] = []

    def make(number: int) -> Callable[..., Any]:
        def forward(*positional: Any, **named: Any) -> Any:
            if len(returned) != number:
                raise NotApart("its blocks are not called in turn, once each")
            hidden = returned[-1] if returned else _first_hidden(positional, named)
            call, has_hidden = _without_hidden(positional, named, hidden)
            if not has_hidden:
                raise NotApart("a block gets something else than the hidden states of the one before")
            output = replace(number, hidden, call)
            returned.append(output)
            return (output, *[None] * (outputs - 1)) if outputs else output

        return forward

    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for number, layer in enumerate(layers):
            layer.__dict__["forward"] = make(number)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = forward


def _first_hidden(positional: tuple[Any, ...], named: dict[str, Any]) -> torch.Tensor:
    hidden = positional[0] if positional else named.get("hidden_states")
    if not isinstance(hidden, torch.Tensor) or hidden.ndim != 3:
        raise NotApart("its first block is called without hidden states")
    return hidden


def _without_hidden(positional: tuple[Any, ...], named: dict[str, Any], hidden: torch.Tensor) -> tuple[Call, bool]:
    """The call without its hidden states, and whether it has them once."""
    marked = [_Hidden() if value is hidden else value for value in positional]
    marked_named = {name: _Hidden() if value is hidden else value for name, value in named.items()}
    count = sum(isinstance(value, _Hidden) for value in (*marked, *marked_named.values()))
    return Call(tuple(marked), marked_named), count == 1


def require_independent_arguments(calls: Sequence[Call]) -> None:
    """Only through the hidden states may a block's arguments depend on weights, and none may be an object that blocks alter."""
    for call in calls:
        for place, value in enumerate(call.positional):
            _require_independent(str(place), value)
        for name, value in call.named.items():
            _require_independent(name, value)


def _require_independent(name: str, value: Any) -> None:
    if isinstance(value, tuple):
        for part in value:
            _require_independent(name, part)
    elif isinstance(value, torch.Tensor):
        if value.requires_grad:
            raise NotApart(f"the argument {name} of a block depends on weights")
    elif not isinstance(value, (_Hidden, *_PLAIN)):
        raise NotApart(f"the argument {name} of a block is a {type(value).__name__}")


def _moved(value: Any, device: torch.device, moved: dict[int, torch.Tensor]) -> Any:
    """The value with its tensors on the device; `moved` has the copies by the originals' ids."""
    if isinstance(value, torch.Tensor):
        if value.device == device:
            return value
        if id(value) not in moved:
            moved[id(value)] = value.to(device)
        return moved[id(value)]
    if isinstance(value, tuple):
        return tuple(_moved(part, device, moved) for part in value)
    if isinstance(value, dict):
        return {name: _moved(part, device, moved) for name, part in value.items()}
    return value
