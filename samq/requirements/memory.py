"""Memory and disk that each stage takes, by formulas that follow the code of the stages.

They were compared with what torch allocated on an H200 (benchmarks/large_model.py). Gradients of 8B in memory: 30.2 GiB by
the formula, 29.8 measured. A 70B shape from disk: gradients 8.9 and 8.5, inputs of layers 12.1 and 12.0, compensation 13.5 and
12.6. The driver saw up to 17.1 in use. On a processor, beside Python itself: gradients of 135M in memory 1.3 and 1.4, and of
2B from disk 0.8 and 0.9. The formulas are for transformers of linear layers. They do not know what a model keeps beside those
(states of Mamba, windows of attention).
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from samq.gguf.codes import GROUP
from samq.gguf.formats import EMBEDDING, OUTPUT
from samq.requirements.outline import Outline
from samq.sensitivity.gram import MATRICES_BYTES
from samq.sensitivity.offloading import READ_AT_ONCE
from samq.sensitivity.placement import WHOLE_SHARE
from samq.sensitivity.residence import BLOCKS_SHARE, READERS

FLOAT, DOUBLE = 4, 8
# Weights that compensation rounds at a time, on a GPU and on a processor (samq.quantization.compensation)
ROUNDED_AT_ONCE = {True: 2**28, False: 2**24}
PRICED_AT_ONCE = 2**22  # weights that a thread prices at a time (samq.allocation.price_rows)
STATES_SHARE = 3  # hidden states are on the GPU if so many times their bytes are free (samq.sensitivity.memory)


@dataclass(frozen=True)
class Taken:
    """Bytes that a stage takes."""

    gpu: int = 0
    ram: int = 0
    scratch: int = 0  # of the disk, until the stage has ended
    kept: int = 0  # of the disk, afterwards

    def beside(self, other: Self) -> "Taken":
        """Of both at once."""
        return Taken(self.gpu + other.gpu, self.ram + other.ram, self.scratch + other.scratch, self.kept + other.kept)


@dataclass(frozen=True)
class TorchRun:
    """How torch runs the model over sequences."""

    outline: Outline
    itemsize: int  # bytes of a weight and of an activation
    on_gpu: bool
    rooms: tuple[int, ...]  # bytes of the device, or of each GPU, that the model may take: what is free, or the limit
    batch_size: int
    sequence_tokens: int

    @property
    def weights(self) -> int:
        """Bytes of all weights in torch's type."""
        return self.outline.weights * self.itemsize

    @property
    def is_whole(self) -> bool:
        """Whether all weights are on the device: as `samq.sensitivity.placement` decides. Else blocks wait elsewhere."""
        waits_nowhere = self.outline.is_gguf and not self.on_gpu
        return waits_nowhere or self.weights * WHOLE_SHARE <= sum(self.rooms)

    @property
    def is_spread(self) -> bool:
        """Whether the weights are on several GPUs, since the first does not hold all. Else the first needs the most."""
        return self.is_whole and self.on_gpu and self.weights * WHOLE_SHARE > self.rooms[0]

    @property
    def room(self) -> int:
        """Bytes that the model may take where it is."""
        return sum(self.rooms) if self.is_spread else self.rooms[0]

    @property
    def staying(self) -> int:
        """Bytes of weights that are on the device all the time: all, or those that do not wait elsewhere.

        Beside blocks on disk the matrices around them wait there too, and beside those of a GGUF, in RAM, they stay.
        """
        if self.is_whole:
            return self.weights
        around = self.outline.around.values()
        return (
            sum(tensor.weights for tensor in around if self.outline.is_gguf or len(tensor.shape) == 1) * self.itemsize
        )

    @property
    def resident(self) -> int:
        """Bytes of weights on the device while blocks run: what stays, the block that runs and the one that comes."""
        return self.staying + (0 if self.is_whole else self.two_blocks + self.pages)

    @property
    def before_blocks(self) -> int:
        """Bytes of weights on the device before the first block: all matrices around the blocks but the output."""
        return self._with_ends(lambda name: name != OUTPUT)

    @property
    def after_blocks(self) -> int:
        """Bytes of weights on the device after the last block: the output."""
        output = OUTPUT if OUTPUT in self.outline.around else EMBEDDING
        return self._with_ends(lambda name: name == output)

    def _with_ends(self, comes: Callable[[str], bool]) -> int:
        if self.is_whole or self.outline.is_gguf:
            return self.staying
        matrices = (tensor for name, tensor in self.outline.around.items() if len(tensor.shape) > 1 and comes(name))
        return self.staying + sum(tensor.weights for tensor in matrices) * self.itemsize + self.pages

    @property
    def pages(self) -> int:
        """Bytes of the files that are being read, which count on a processor."""
        return 0 if self.is_whole or self.on_gpu else min(self.block, READERS * READ_AT_ONCE)

    @property
    def logits(self) -> int:
        """Bytes of a sequence's logits in float32."""
        return FLOAT * self.outline.vocabulary * self.sequence_tokens

    @property
    def forward(self) -> int:
        """Bytes of the device that a pass without gradients takes."""
        return max(
            self.resident + self.activations * self.batch_tokens,
            self.before_blocks,
            self.after_blocks + 2 * self.logits,
        )

    @property
    def block(self) -> int:
        """Bytes of the weights of the largest block."""
        return sum(tensor.weights for tensor in self.outline.largest_block) * self.itemsize

    @property
    def two_blocks(self) -> int:
        """Bytes of a block and the next one on the device; of large stacks one expert and the next one, of both.

        As `samq.sensitivity.residence` brings them. A stack that no module of transformers computes expert by expert counts too.
        """
        stacks = [tensor for tensor in self.outline.largest_block if len(tensor.shape) > 2]
        if 2 * self.block <= self.room * BLOCKS_SHARE or not stacks:
            return 2 * self.block
        experts = sum(tensor.weights for tensor in stacks) * self.itemsize
        return 2 * (self.block - experts) + 2 * experts // stacks[0].shape[0]

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch, with its padding."""
        return self.batch_size * self.sequence_tokens

    @cached_property
    def activations(self) -> int:
        """Bytes of what enters and leaves the layers of a block, a token."""
        matrices = [tensor for tensor in self.outline.largest_block if len(tensor.shape) > 1]
        values = 0.0
        for tensor in matrices:
            *stacked, rows, row_length = tensor.shape
            values += (stacked[0] if stacked else 1) * self.outline.share(tensor) * (rows + row_length)
        return int(values * self.itemsize)

    @cached_property
    def gram_bytes(self) -> list[int]:
        """Bytes of the Gram matrix of each matrix of a block and of each expert, some of which share an input."""
        matrices = [tensor for tensor in self.outline.largest_block if len(tensor.shape) > 1]
        return [FLOAT * tensor.row_length**2 for tensor in matrices for _ in range(math.prod(tensor.shape[:-2]))]

    def states(self, positions: int) -> int:
        """Bytes of the hidden states of so many tokens before a block."""
        return positions * self.outline.width * self.itemsize

    def on_device(self, size: int, *, ram: int = 0) -> Taken:
        """Taken on the device that computes, and so much on the host."""
        waiting = self.weights if self.outline.is_gguf and self.on_gpu else 0  # transformers reads a GGUF into RAM
        return Taken(gpu=size, ram=ram + waiting) if self.on_gpu else Taken(ram=size + ram)


def gradients(run: TorchRun, sequences: int) -> Taken:
    """Backward passes over all sequences (`samq.sensitivity.backpropagation`).

    Autograd keeps what enters and leaves the layers, and backward has as much again in gradients. By blocks that is of one
    block, and the slopes of all sequences are on the device. The states before each block lie on disk, or on the GPU if the
    model and they fit. Whole, on a processor, it is of all blocks, with logits, their gradient and two copies of both.
    """
    depth, positions = len(run.outline.blocks), sequences * run.sequence_tokens
    activations = 2 * run.activations * run.batch_tokens
    if run.is_whole and not run.on_gpu:
        return run.on_device(run.weights + depth * activations + 4 * run.logits * run.batch_size)
    slopes, states = run.states(positions), (depth + 1) * run.states(positions)
    working = slopes + max(run.resident + activations, run.before_blocks, run.after_blocks + 4 * run.logits)
    if run.is_whole and STATES_SHARE * states <= run.room - run.weights:
        return run.on_device(working + states)
    # On the host: states before this block and the next, and those that a thread is writing. On disk: two sets of slopes.
    return run.on_device(working, ram=3 * slopes).beside(Taken(scratch=states + 2 * slopes))


def check(run: TorchRun, sequences: int) -> Taken:
    """Gradients that a plan's rounding errors are multiplied with, a weight's at a time (`samq.allocation.prediction_check`)."""
    errors = FLOAT * max(tensor.weights for tensor in run.outline.tensors.values())
    return gradients(run, sequences).beside(Taken(gpu=errors) if run.on_gpu else Taken(ram=errors))


def layer_inputs(run: TorchRun, tokens: int, *, matrices: bool) -> Taken:
    """Moments of the layers' inputs (`samq.sensitivity.gram`), and with `matrices` what compensation leaves of an error.

    A matrix is factored in float64 (`samq.quantization.gptq`). While matrices are added up there are two of each: of the
    batches at work, and of all before.
    """
    factor = DOUBLE // FLOAT * max(run.gram_bytes) if matrices else 0
    return _inputs(run, tokens, factor, matrices=matrices)


def compensation(run: TorchRun, tokens: int) -> Taken:
    """Compensated rounding of all plans (`samq.quantization.compensation`).

    Beside the Gram matrices there are a factor in float64 and the weights that are rounded at a time. Each of these is there in
    float32 and has two codes, and some share a scale and an offset. On the host it has its errors before and after, and blocks,
    and the next ones are read and rounded, without their errors.
    """
    at_once = min(ROUNDED_AT_ONCE[run.on_gpu], len(run.gram_bytes) * max(t.weights for t in run.outline.largest_block))
    of_groups = 2 * 2 * FLOAT // GROUP  # scales and offsets, in two orders
    factor_and_weights = DOUBLE // FLOAT * max(run.gram_bytes) + (FLOAT + of_groups + 2) * at_once
    taken = _inputs(run, tokens, factor_and_weights, matrices=True)
    return taken.beside(Taken(ram=(4 * FLOAT + 6) * at_once))


def _inputs(run: TorchRun, tokens: int, factor: int, *, matrices: bool) -> Taken:
    # as much again while they are added up: those of a run of batches, and those of all before
    sums = min(sum(run.gram_bytes), max(MATRICES_BYTES // 2, *run.gram_bytes)) if matrices else 0
    of_output = 2 * FLOAT * run.outline.width**2 if matrices else 0
    states = run.states(tokens)
    # The next block is fetched afterwards, and this one is gone before the last factor.
    block = 0 if run.is_whole else run.two_blocks // 2
    passing = run.resident - block + 2 * sums + run.activations * run.batch_tokens
    ends = max(run.before_blocks, run.after_blocks + of_output + 2 * run.logits)
    stays = block if sums < sum(run.gram_bytes) else 0  # it runs again for each part of the matrices
    device = max(passing, ends, run.staying + stays + sums + factor)
    if run.on_gpu and run.is_whole and STATES_SHARE * 3 * states <= run.room - run.weights:
        return run.on_device(device + 3 * states)
    return run.on_device(device, ram=3 * states).beside(Taken(scratch=3 * states))


def pricing() -> Taken:
    """Prices: each thread has some weights, rounded, their error, and the blocks."""
    return Taken(ram=len(os.sched_getaffinity(0)) * 4 * FLOAT * PRICED_AT_ONCE)


def llama_quantize(outline: Outline) -> Taken:
    """llama-quantize has the largest tensor in float32, and room of that size for what it becomes (src/llama-quant.cpp)."""
    return Taken(ram=2 * FLOAT * max(tensor.weights for tensor in outline.tensors.values()))
