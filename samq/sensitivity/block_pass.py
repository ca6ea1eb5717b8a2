"""All sequences through one decoder block after another, forward and then backward.

The hidden states before each block are kept, and what lies between is computed again on the way back (Chen et al. 2016,
arXiv:1604.06174). A block's weights are needed twice, for all sequences at once. Several devices share the sequences
(`samq.sensitivity.shares`), and give the bits that one gives. With a folder, a pass that was killed goes on at the block where
it was, with any number of devices.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from samq.data.tokens import TokenBatch
from samq.progress import Progress
from samq.sensitivity.batches import batches
from samq.sensitivity.block_calls import Call
from samq.sensitivity.blocks import PROBE_TOKENS, Blocks, main_device
from samq.sensitivity.expert_gradients import Batch
from samq.sensitivity.gradients import SampleGradients
from samq.sensitivity.hidden_states import HiddenStates, Writer
from samq.sensitivity.loss import Loss
from samq.sensitivity.memory import Memory, needs_gpu_memory, reusing_freed_memory
from samq.sensitivity.offloading import has_offloaded
from samq.sensitivity.reduction import Sums
from samq.sensitivity.residence import Placed, Residence
from samq.sensitivity.resume import Checkpoints
from samq.sensitivity.shares import in_turn, shares
from samq.sensitivity.unneeded_outputs import unneeded, without_outputs


@dataclass(frozen=True)
class Sequences:
    """Some sequences in one batch, padded to the longest: token ids and mask (sequences, T)."""

    ids: torch.Tensor
    mask: torch.Tensor  # 0 at padding
    batch: Batch

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask."""
        return self.ids.to(device), self.mask.to(device)

    def memory(self) -> AbstractContextManager[None]:
        """Says what does not fit if a GPU runs out of memory."""
        return needs_gpu_memory(
            f"a pass over {len(self.batch.lengths)} sequences of up to {self.batch.longest} tokens",
            "use a smaller batch size or shorter sequences",
        )


def batched(tokens: TokenBatch, batch_size: int) -> list[Sequences]:
    """The sequences, so many a batch."""
    numbered, first = [], 0
    for ids, mask, _ in batches(tokens, batch_size):
        numbered.append(Sequences(ids, mask, Batch(first, mask.sum(1).tolist())))
        first += len(ids)
    return numbered


@dataclass(frozen=True)
class Work:
    """What a backward pass is for."""

    gradients: SampleGradients
    sums: Sums
    loss: Loss
    batches: list[Sequences]
    progress: Progress


class _OneByOneError(Exception):
    """A weight turned out to need batches of one sequence."""


class BlockPass:
    """A pass over all sequences, which hands over all gradients."""

    def __init__(self, blocks: Blocks, work: Work, memory: Memory) -> None:
        self.blocks, self.work = blocks, work
        self.batches = work.batches
        self.device = main_device(blocks.model)
        self.devices = memory.sharing(self.device)
        self._memory = memory
        self._place = memory.place(self._bytes_of_states(), self.devices, offloaded=has_offloaded(blocks.model))
        self.checkpoints = Checkpoints(memory.folder if self._place is None else None)
        self._steps = 0
        self._calls: list[list[Call]] = []  # of each batch, for each block
        self._slopes: dict[int, torch.Tensor] = {}  # batch -> gradient of the loss with respect to its hidden states
        # The blocks whose weights may be used without their module: not known before they are in memory.
        self._not_looked_at = {number for number, layer in enumerate(blocks.layers) if has_offloaded(layer)}
        # The linear layers of a block -> the numbers of those whose outputs the way back does not need.
        self._unneeded: dict[tuple[str, ...], list[int]] = {}

    def run(self) -> None:
        """Run the pass, from where a killed one was."""
        on_disk = has_offloaded(self.blocks.model)
        reusing = reusing_freed_memory() if on_disk and self.device.type == "cpu" else nullcontext()
        with reusing, self.blocks.resident(self.devices, self._memory) as weights, deterministic(self.device):
            try:
                if self.checkpoints.has("one-by-one"):
                    raise _OneByOneError
                self._pass(weights)
            except _OneByOneError:  # found out before the first gradient
                self.batches = [one for sequences in self.batches for one in _singles(sequences)]
                if not self.checkpoints.has("one-by-one"):
                    self.checkpoints.clear()
                    self.checkpoints.save("one-by-one", {})
                self._pass(weights)
        self.checkpoints.clear()

    def _pass(self, weights: Residence) -> None:
        self._calls, self._steps = [], 0
        self._saved = len(self.blocks) + 1  # the states of blocks from here on are not needed any more
        self._shares = shares(range(len(self.batches)), len(self.devices))
        with (
            HiddenStates(self._place, self.checkpoints, writer := Writer()) as self._states,
            HiddenStates(self._place, self.checkpoints, writer, "slopes") as self._kept_slopes,
            writer as self._writer,  # leaves first
        ):
            with torch.no_grad():
                self._enter(weights)
                if not self._turned():
                    self._forward(weights)
            if not self._turned():
                self._turn(weights)
            self._backward(weights)
            self._embed(weights)

    def _bytes_of_states(self) -> int:
        """Of the hidden states of all sequences before every block and after the last."""
        embedding: torch.Tensor = self.blocks.model.get_input_embeddings().weight  # type: ignore[assignment]
        width: int = self.blocks.model.config.get_text_config().hidden_size
        positions = sum(sequences.ids.numel() for sequences in self.batches)
        return (len(self.blocks) + 1) * positions * width * embedding.element_size()

    def _enter(self, weights: Residence) -> None:
        with weights.part(weights.before, None) as before, before.on(self.device):
            self._probe = self.blocks.enter(*(part[:1, :PROBE_TOKENS] for part in self.batches[0].on(self.device)))
            for share, numbers in enumerate(self._shares):
                for number in numbers:
                    entered = self.blocks.enter(*self.batches[number].on(self.device)).on(self.devices[share])
                    self._states.put(0, number, entered.hidden)
                    self._calls.append(entered.calls)
        self._states.close(0)

    def _forward(self, weights: Residence) -> None:
        last = len(self.blocks) - 1
        done = max((block for block in range(last + 2) if self._states.has(block)), default=0)
        self._tell(done)
        for block in range(done, last + 1):
            with weights.part(block, block + 1) as placed:
                for share, number, hidden in self._states.each(block, self._shares, placed.devices):
                    self._look_at(block, placed, hidden)
                    with self.batches[number].memory(), placed.on(placed.devices[share]):
                        self._states.put(block + 1, number, self.blocks.run(block, hidden, self._calls[number][block]))
            self._states.close(block + 1)
            self._tell(1)

    def _look_at(self, block: int, placed: Placed, hidden: torch.Tensor) -> None:
        """Find out which weights of a block are used without their module, if it was not in memory before.

        `hidden` is the input of the first batch on the first device.
        """
        if block in self._not_looked_at:
            self._not_looked_at.remove(block)
            call, gradients = self._probe.calls[block], self.work.gradients
            with placed.on(placed.devices[0]) as layer:
                gradients.require_calls(lambda: self.blocks.run(block, hidden[:1, :PROBE_TOKENS], call), layer)
            if gradients.one_sample_only and any(len(sequences.batch.lengths) > 1 for sequences in self.batches):
                raise _OneByOneError

    def _turned(self) -> bool:
        """Whether the losses, and their gradients with respect to the last hidden states, are known."""
        return self.checkpoints.has("turned")

    def _turn(self, weights: Residence) -> None:
        """From the last hidden states to the loss and back, a sequence at a time: logits are large."""
        last = len(self.blocks)
        states: dict[int, torch.Tensor] = {}  # of each share's batch
        rows = [[(n, row) for n in numbers for row in range(len(self.batches[n].ids))] for numbers in self._shares]
        with weights.part(weights.after, None) as around:  # the last block comes afterwards: this takes memory enough
            for share, (number, row) in in_turn(rows):
                sequences = self.batches[number]
                if row == 0:
                    states[share] = self._states.get(last, number, around.devices[share])
                    self._slopes[number] = torch.zeros_like(states[share])
                length = sequences.batch.lengths[row]
                hidden = states[share][row : row + 1, :length].requires_grad_()
                with sequences.memory(), around.on(around.devices[share]):
                    self._turn_one(share, hidden, sequences.ids[row], Batch(sequences.batch.first + row, [length]))
                self._slopes[number][row, :length] = _gradient(hidden)[0]
        self.work.sums.add_shares()
        self.work.loss.summed()  # before the way back, which a loss that is not finite would spoil
        self._save(last)
        state = self.work.loss.state() | self.work.gradients.pending()
        copies = {name: tensor.clone() for name, tensor in state.items()}  # the way back may alter them
        self._writer.submit(partial(self.checkpoints.save, "turned", copies))

    def _turn_one(self, share: int, hidden: torch.Tensor, ids: torch.Tensor, batch: Batch) -> None:
        """One sequence from its last hidden states to the loss and back."""
        self.work.sums.begin(share)
        with self.work.gradients.within(None, batch) as backward:
            logits = self.blocks.logits(hidden, ids[None, : batch.longest].to(hidden.device))
            backward(logits, self.work.loss.gradient(batch.first, logits[0].detach())[None])

    def _backward(self, weights: Residence) -> None:
        for block in reversed(range(self._restore())):
            with weights.part(block, block - 1) as placed:
                left_out: list[nn.Linear] | None = None
                for share, number, hidden in self._states.each(block, self._shares, placed.devices):
                    self._look_at(block, placed, hidden)
                    if left_out is None:
                        left_out = self._unneeded_layers(block, placed, hidden)
                    with (
                        self.batches[number].memory(),
                        placed.on(placed.devices[share]) as layer,
                        without_outputs(left_out),
                    ):
                        self._back_through(block, layer, share, number, hidden)
                self.work.sums.add_shares()
            self._save(block)
            self._tell(1)

    def _unneeded_layers(self, block: int, placed: Placed, hidden: torch.Tensor) -> list[nn.Linear]:
        """The linear layers of a block whose outputs the way back does not need.

        `hidden` is the input of the first batch on the first device.
        """
        some, call = hidden[:1, :PROBE_TOKENS], self._probe.calls[block]
        with placed.on(placed.devices[0]) as layer:
            layers = self.work.gradients.linear_layers(layer)
            names = {module: name for name, module in layer.named_modules()}
            alike = tuple(names[one] for one in layers)

            def run() -> None:
                with self.work.gradients.within(layer, Batch(0, [some.shape[1]])):
                    self.blocks.run(block, some.detach().requires_grad_(), call)

            of_another = self._unneeded.get(alike)
            expected = None if of_another is None else [layers[number] for number in of_another]
            not_needed = unneeded(layers, run, expected)
            self._unneeded[alike] = [layers.index(one) for one in not_needed]
        return not_needed

    def _back_through(self, block: int, layer: nn.Module, share: int, number: int, hidden: torch.Tensor) -> None:
        """One batch through a block again, and back."""
        hidden.requires_grad_()
        self.work.sums.begin(share)
        with self.work.gradients.within(layer, self.batches[number].batch) as backward:
            output = self.blocks.run(block, hidden, self._calls[number][block])
            backward(output, self._slopes[number].to(output.device))
        self._slopes[number] = _gradient(hidden)

    def _save(self, block: int) -> None:
        """Keep what a pass that goes on here needs: the sums of this block's weights, and the slopes before it.

        Where the disk is slower than the computation, not of every block: a killed pass would run some again.
        """
        if self._place is None:
            self._writer.submit(partial(self.checkpoints.save, f"sums-{block:04}", self.work.sums.changes()))
            if self._writer.is_full() and block < len(self.blocks):
                return
            for number, slopes in self._slopes.items():
                self._kept_slopes.put(block, number, slopes)
            self._kept_slopes.close(block)
            if self._saved > block:
                self._kept_slopes.drop(self._saved)
        for after in range(block, self._saved):
            self._states.drop(after)
        self._saved = block

    def _restore(self) -> int:
        """Have what a killed pass had, if that got to its turn; returns the number of blocks whose backward is to come."""
        if self._slopes:  # this pass has made its turn itself
            return len(self.blocks)
        there = next(block for block in range(len(self.blocks) + 1) if self._kept_slopes.has(block))
        for block in reversed(range(there, len(self.blocks) + 1)):
            self.work.sums.restore(self.checkpoints.load(f"sums-{block:04}"))
        self._slopes = {
            number: self._kept_slopes.get(there, number, self.devices[share]) for share, number in in_turn(self._shares)
        }
        turned = self.checkpoints.load("turned")
        self.work.loss.restore(turned)
        self.work.gradients.restore_pending(turned)
        self._saved = there
        self._tell(2 * len(self.blocks) - there)
        return there

    def _embed(self, weights: Residence) -> None:
        self.work.sums.begin(0)
        with weights.part(weights.before, None) as before, before.on(self.device):
            for number, sequences in enumerate(self.batches):
                with self.work.gradients.within(None, sequences.batch) as backward:
                    hidden = self.blocks.enter(*sequences.on(self.device)).hidden
                    backward(hidden, self._slopes.pop(number).to(hidden.device))

    def _tell(self, blocks: int) -> None:
        self._steps += blocks
        self.work.progress(self._steps, 2 * len(self.blocks))


def _singles(sequences: Sequences) -> Iterator[Sequences]:
    """A batch's sequences, each a batch without padding."""
    for row, length in enumerate(sequences.batch.lengths):
        some = slice(row, row + 1), slice(length)
        yield Sequences(sequences.ids[some], sequences.mask[some], Batch(sequences.batch.first + row, [length]))


def _gradient(hidden: torch.Tensor) -> torch.Tensor:
    """What backward has left in a leaf."""
    assert hidden.grad is not None
    return hidden.grad


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Let CUDA add up in a fixed order, as the CPU always does."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filling = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False  # it is written before it is read
    torch.use_deterministic_algorithms(True)  # with warnings only, attention would not become deterministic
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filling
