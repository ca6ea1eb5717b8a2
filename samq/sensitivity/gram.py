"""Second moments of the inputs of weight matrices on calibration text: Gram matrices, one block of the model at a time.

The Gram matrix G of a layer with input x is the mean of x x^T over tokens, (row length, row length). Its diagonal is the
importance matrix of llama-imatrix. The whole matrix determines what an error dW of a row does to the layer's output. The
mean square of the output's error is dW G dW^T.

All matrices of a large model would take more memory than the model itself. So they are handed over as soon as a block's are
there, and whoever takes them uses them before the next block runs.
"""

from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedModel

from samq.data.tokens import TokenBatch
from samq.gguf.formats import EMBEDDING
from samq.progress import Progress, silent
from samq.sensitivity.block_calls import Entered
from samq.sensitivity.block_pass import Sequences, batched
from samq.sensitivity.blocks import PROBE_TOKENS, Blocks, main_device
from samq.sensitivity.expert_gradients import Batch
from samq.sensitivity.experts import one_by_one
from samq.sensitivity.hidden_states import HiddenStates, Writer
from samq.sensitivity.layout import Weight
from samq.sensitivity.memory import UNLIMITED, Memory
from samq.sensitivity.moments import InputSums, Piece, Rounds
from samq.sensitivity.offloading import has_offloaded
from samq.sensitivity.residence import Placed, Residence
from samq.sensitivity.resume import Checkpoints
from samq.sensitivity.shares import rounds

MATRICES_BYTES = 8 * 2**30  # of the matrices that are added up at a time; a block with more runs again


def input_moments(
    model: PreTrainedModel,
    tokens: TokenBatch,
    weights: list[Weight],
    *,
    matrices: bool = True,
    batch_size: int = 1,
    memory: Memory = UNLIMITED,
    matrices_bytes: int = MATRICES_BYTES,
    progress: Progress = silent,
) -> Iterator[Piece]:
    """Yield the moments of the inputs of all layers, block after block, and at last of those around the blocks.

    Inputs that are always zero are left out. So are experts that saw no token, if there are no matrices; with matrices they
    have that of all experts.

    Args:
        model: in any floating-point type, on any device; moments are added up in float32.
        tokens: at least one sequence; padding does not count.
        weights: the model's, as its GGUF has them (`samq.sensitivity.layout`).
        matrices: whole Gram matrices; else their diagonals alone.
        batch_size: sequences a forward pass; 1 with experts whose tokens cannot be told (`samq.sensitivity.experts`).
        memory: what hidden states may take. With a folder a pass that was killed goes on at a part that was not finished. One
            is finished when the next one's moments are asked for.
        matrices_bytes: limit for the matrices that are added up at a time; a part with more runs several times.
        progress: told of the parts that are done.

    Raises:
        SamqError: NaN or Inf in the input of a layer, or too little memory.
    """
    model.eval()
    inputs = InputSums(model, weights, matrices_bytes if matrices else 0)
    batches = [_probe(tokens), *batched(tokens, 1 if inputs.one_sample_only else batch_size)]
    blocks = Blocks.of(model)
    with one_by_one(model, inputs.see):
        if blocks is None:
            yield from _whole(model, batches, inputs, progress)
        else:
            yield from _by_blocks(blocks, batches, inputs, memory, progress)


def without_input(model: PreTrainedModel, weights: list[Weight]) -> list[str]:
    """The weights whose inputs are not measured whatever the text, by their GGUF names.

    The embedding is not among them, since it has no input.
    """
    measured = InputSums(model, weights, MATRICES_BYTES).names
    return [weight.name for weight in weights if weight.name not in {*measured, EMBEDDING}]


def _probe(tokens: TokenBatch) -> Sequences:
    """A few tokens, which show what layers share an input."""
    length = int(min(PROBE_TOKENS, tokens.lengths[0]))
    ids = torch.from_numpy(tokens.ids[:1, :length].astype(np.int64))
    return Sequences(ids, torch.ones_like(ids), Batch(0, [length]))


def _whole(model: PreTrainedModel, batches: list[Sequences], inputs: InputSums, progress: Progress) -> Iterator[Piece]:
    device = main_device(model)

    def run(number: int, _: int) -> None:
        ids, mask = batches[number].on(device)
        inputs.about(batches[number].mask)
        with batches[number].memory():
            model(input_ids=ids, attention_mask=mask, use_cache=False)
        progress(number, len(batches))

    yield from inputs.measure(0, list(model.modules()), run, rounds(range(1, len(batches)), 1))
    progress(len(batches), len(batches))


def _by_blocks(
    blocks: Blocks, batches: list[Sequences], inputs: InputSums, memory: Memory, progress: Progress
) -> Iterator[Piece]:
    device = main_device(blocks.model)
    devices = memory.sharing(device)
    turns = rounds(range(1, len(batches)), len(devices))
    share_of = {batch: share for of_round in turns for share, run in enumerate(of_round) for batch in run} | {0: 0}
    with blocks.resident(devices, memory) as resident:
        with torch.no_grad(), resident.part(resident.before, None) as before, before.on(device):
            entered = [
                blocks.enter(*sequences.on(device)).on(devices[share_of[number]])
                for number, sequences in enumerate(batches)
            ]
        size = 3 * sum(batch.hidden.nbytes for batch in entered)
        place = memory.place(size, devices, offloaded=has_offloaded(blocks.model))
        checkpoints, writer = Checkpoints(memory.folder if place is None else None), Writer()
        with HiddenStates(place, checkpoints, writer, "inputs") as states, writer:  # leaves first
            yield from _through(blocks, batches, entered, turns, inputs, (states, resident), progress)


def _through(
    blocks: Blocks,
    batches: list[Sequences],
    entered: list[Entered],
    turns: Rounds,
    inputs: InputSums,
    kept: tuple[HiddenStates, Residence],
    progress: Progress,
) -> Iterator[Piece]:
    (states, resident), device, count = kept, main_device(blocks.model), len(blocks)
    done = max((block for block in range(count + 1) if states.has(block)), default=0)
    if not done:
        for number, batch in enumerate(entered):
            states.put(0, number, batch.hidden)
        states.close(0)
    for block in range(done, count):
        progress(block, count + 1)
        # Fetching the next block meanwhile would save little time, and take memory that the matrices need.
        with resident.part(block, None) as placed:

            def run(number: int, share: int, block: int = block, placed: Placed = placed) -> None:
                hidden = states.get(block, number, placed.devices[share])
                with batches[number].memory(), placed.on(placed.devices[share]):
                    inputs.about(batches[number].mask)
                    states.put(block + 1, number, blocks.run(block, hidden, entered[number].calls[block]))

            yield from inputs.measure(block, list(placed.module.modules()), run, turns, placed.release)
        states.close(block + 1)
        states.drop(block)
    progress(count, count + 1)

    with resident.part(resident.after, None) as after:

        def run_around(number: int, _: int) -> None:
            sequences, hidden = batches[number], states.get(count, number, device)
            for row, length in enumerate(sequences.batch.lengths):  # one at a time: logits are large
                with sequences.memory(), after.on(device):
                    inputs.about(torch.ones(1, length))
                    blocks.logits(hidden[row : row + 1, :length], sequences.ids[row : row + 1, :length].to(device))

        inside = {module for layer in blocks.layers for module in layer.modules()}
        around = [module for module in blocks.model.modules() if module not in inside]
        yield from inputs.measure(count, around, run_around, rounds(range(1, len(batches)), 1), after.release)
    states.drop(count)
    progress(count + 1, count + 1)
