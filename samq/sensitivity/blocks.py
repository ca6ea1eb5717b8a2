"""A causal LM taken apart into its decoder blocks, which then run one at a time over all sequences.

The model's own forward function runs with the blocks replaced. It makes what comes before the blocks and after them, and the
arguments of each block. So no architecture has code of its own here. A model whose blocks exchange more
than hidden states does not come apart like this, and `Blocks.of` says why.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from samq.errors import SamqError
from samq.sensitivity.block_calls import Call, Entered, NotApart, replaced, require_independent_arguments
from samq.sensitivity.memory import UNLIMITED, Memory, free_bytes
from samq.sensitivity.offloading import computes_on, has_offloaded
from samq.sensitivity.residence import ALL, NOTHING, Needed, Residence

logger = logging.getLogger(__name__)
PROBE_TOKENS = 8  # of the sequence that shows whether a model comes apart, and how its weights are used

# What a forward function raises without its blocks, if it is not made for that
_NOT_APART = (NotApart, TypeError, ValueError, IndexError, RuntimeError, AttributeError)


class _AllEntered(Exception):
    """Ends a forward pass of the model after its last block was called."""


class Blocks:
    """The decoder blocks of a model, in order."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[nn.Module], outputs: int, needed: Needed = ALL) -> None:
        """`outputs`: how many things a block returns in a tuple, hidden states first; 0 if it returns hidden states alone."""
        self.model = model
        self.layers = list(layers)
        self.outputs = outputs
        self._needed = needed

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Blocks | None":
        """Take a model apart; None, with the reason in the log, if it does not come apart.

        If all its weights are in memory, the blocks one after the other must give the logits of the model on a few tokens.
        Raises SamqError if its blocks are on disk and it does not come apart: then it cannot run at all.
        """
        try:
            return _taken_apart(model)
        except _NOT_APART as reason:
            if has_offloaded(model):
                raise cannot_run(model, reason) from reason
            logger.info("%s is measured whole, and not a block at a time: %s", type(model).__name__, reason)
            return None

    def enter(self, ids: torch.Tensor, mask: torch.Tensor) -> Entered:
        """Run what comes before the first block on token ids and mask (sequences, T), with its weights on their device."""
        calls: list[Call] = []
        first: list[torch.Tensor] = []

        def replace(number: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
            if number == 0:
                first.append(hidden)
            calls.append(call)
            if number == len(self.layers) - 1:
                raise _AllEntered
            return hidden

        try:
            self._forward(replace, ids, mask)
        except _AllEntered:
            return Entered(first[0], calls)
        raise AssertionError("the model's forward function calls its last block")

    def resident(self, devices: Sequence[torch.device] = (), memory: Memory = UNLIMITED) -> Residence:
        """What brings the parts' weights to the devices that compute: by default to the model's main one."""
        places = list(devices) or [main_device(self.model)]
        room = min(free_bytes(device, memory.limit_bytes) for device in places)
        return Residence(self.layers, self.model, places, self._needed, room)

    def run(self, number: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """Run one block, whose weights are on the device of its hidden states."""
        positional, named = call.filled(hidden)
        output = self.layers[number](*positional, **named)
        result: torch.Tensor = output[0] if self.outputs else output
        return result

    def logits(self, hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Run what comes after the last block on its output, of these token ids and, if there is padding, mask (sequences, T).

        The weights of what is around the blocks are on the device of the output.
        """

        def replace(number: int, entering: torch.Tensor, call: Call) -> torch.Tensor:
            return hidden if number == len(self.layers) - 1 else entering

        result: torch.Tensor = self._forward(replace, ids, torch.ones_like(ids) if mask is None else mask).logits
        return result

    def _forward(
        self, replace: Callable[[int, torch.Tensor, Call], torch.Tensor], ids: torch.Tensor, mask: torch.Tensor
    ) -> Any:
        """The model's own forward function with every block replaced."""
        with replaced(self.layers, replace, self.outputs):
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False)


@torch.no_grad()
def logits_of(
    model: PreTrainedModel,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    about: Callable[[int], None] = lambda _: None,
) -> Iterator[torch.Tensor]:
    """The logits of each batch of token ids and mask (sequences, T); a block at a time if the model's blocks are on disk.

    `about` is told a batch's number before any part of the model runs on it.
    """
    device = main_device(model)
    if not has_offloaded(model):
        for number, (ids, mask) in enumerate(batches):
            about(number)
            yield model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        return
    blocks = Blocks.of(model)
    assert blocks is not None, "it raises"
    yield from _logits_by_blocks(blocks, batches, about)


def _logits_by_blocks(
    blocks: Blocks,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    about: Callable[[int], None] = lambda _: None,
) -> Iterator[torch.Tensor]:
    """The logits of each batch, all batches through one block after another."""
    device = main_device(blocks.model)
    entered = []
    with blocks.resident() as weights:
        with weights.part(weights.before, 0) as before, before.on(device):
            for number, (ids, mask) in enumerate(batches):
                about(number)
                entered.append(blocks.enter(ids.to(device), mask.to(device)))
        states = [batch.hidden for batch in entered]
        for block in range(len(blocks)):
            with weights.part(block, block + 1) as placed, placed.on(placed.devices[0]):
                for number, batch in enumerate(entered):
                    about(number)
                    states[number] = blocks.run(block, states[number].to(placed.devices[0]), batch.calls[block])
        with weights.part(weights.after, None) as after:
            for number, (ids, mask) in enumerate(batches):
                about(number)
                with after.on(device):
                    logits = blocks.logits(states[number].to(device), ids.to(device), mask.to(device))
                yield logits


def _taken_apart(model: PreTrainedModel) -> Blocks:
    layers, device = list(block_list(model)), main_device(model)
    _require_own_parameters(model, layers)
    ids = torch.arange(PROBE_TOKENS, device=device)[None]
    parameters = dict(model.named_parameters())
    # How the model computes is seen without the values of what is on disk.
    with (
        Residence(layers, model, [device], NOTHING) as weights,
        weights.part(weights.before, None) as zeros,
        zeros.on(device),
    ):
        blocks = _with_outputs_as_the_model_takes_them(model, layers, ids)
        with _trainable_outside(blocks) as outside:
            entered = blocks.enter(ids, torch.ones_like(ids))
            require_independent_arguments(entered.calls)
            if has_offloaded(model):
                of_both = _leaves(entered.hidden), _leaves(blocks.logits(entered.hidden.detach(), ids))
                needed = [
                    frozenset(id(parameters[name]) for name in outside if id(outside[name]) in of) for of in of_both
                ]
                return Blocks(model, layers, blocks.outputs, Needed(*needed))
    _require_equal_logits(blocks, ids)
    return blocks


def comes_apart(model: PreTrainedModel) -> bool:
    """Whether the model runs a block at a time."""
    try:
        _taken_apart(model)
    except _NOT_APART:
        return False
    return True


def block_list(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks: the one outermost list of modules in the text part that has as many as the configuration says.

    Raises NotApart if there is not just one.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists: list[nn.ModuleList] = []
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            lists += [] if any(module in set(outer.modules()) for outer in lists) else [module]
    if len(lists) != 1:
        raise NotApart(f"it has {len(lists)} lists of {count} blocks")
    return lists[0]


def _require_own_parameters(model: PreTrainedModel, layers: list[nn.Module]) -> None:
    owner: dict[int, int] = {}
    for number, layer in enumerate(layers):
        for parameter in layer.parameters():
            if owner.setdefault(id(parameter), number) != number:
                raise NotApart("two blocks share weights")
    inside = {module for layer in layers for module in layer.modules()}
    for module in model.modules():
        if module not in inside and any(id(parameter) in owner for parameter in module.parameters(recurse=False)):
            raise NotApart("a block shares weights with what is around the blocks")


def _with_outputs_as_the_model_takes_them(model: PreTrainedModel, layers: list[nn.Module], ids: torch.Tensor) -> Blocks:
    """The blocks, which return hidden states alone or first in a tuple: the model's forward function takes one of these."""
    reason: Exception = NotApart("")
    for outputs in (0, 3, 2, 1):
        blocks = Blocks(model, layers, outputs)
        try:
            with torch.no_grad():
                blocks.logits(blocks.enter(ids, torch.ones_like(ids)).hidden, ids)
            return blocks
        except NotApart as error:
            reason = error
        except _NOT_APART as error:
            reason = NotApart(f"its forward function fails without its blocks ({type(error).__name__}: {error})")
    raise reason


@contextmanager
def _trainable_outside(blocks: Blocks) -> Iterator[dict[str, nn.Parameter]]:
    """Let autograd see what depends on the parameters outside the blocks; gives these by their names."""
    inside = {id(parameter) for layer in blocks.layers for parameter in layer.parameters()}
    outside = {name: parameter for name, parameter in blocks.model.named_parameters() if id(parameter) not in inside}
    before = [parameter.requires_grad for parameter in outside.values()]
    try:
        for parameter in outside.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield outside
    finally:
        for parameter, trainable in zip(outside.values(), before, strict=True):
            parameter.requires_grad_(trainable)


def _leaves(output: torch.Tensor) -> set[int]:
    """The ids of the tensors that autograd would give gradients from this one."""
    leaves, seen, left = set(), set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(id(leaf))
        left += [following for following, _ in node.next_functions]
    return leaves


@torch.no_grad()
def _require_equal_logits(blocks: Blocks, ids: torch.Tensor) -> None:
    (ours,) = _logits_by_blocks(blocks, [(ids, torch.ones_like(ids))])
    theirs = blocks.model(input_ids=ids, use_cache=False).logits
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()), equal_nan=True):
        raise NotApart("its blocks in turn compute something else than it does")


def cannot_run(model: PreTrainedModel, reason: Exception) -> SamqError:
    """What to say of a model that neither fits the memory nor comes apart."""
    return SamqError(
        f"{type(model).__name__} does not fit the memory, and does not run a block at a time: {reason}; allow more memory "
        "(memory_limit), or use bfloat16 or more GPUs"
    )


def main_device(model: PreTrainedModel) -> torch.device:
    """Where the model's embedding is, or comes to from disk, and so what is around the blocks."""
    weight: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return computes_on(weight)
