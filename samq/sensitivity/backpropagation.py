"""Backpropagation over token sequences: each sequence's gradients, reduced to what a measurement keeps of them.

The labels of the loss are the text's next tokens, or tokens drawn from the model's distribution. The mean of the squared
gradients of the second kind is the true Fisher information. Memory does not hold the gradients of all sequences, so a
function reduces each gradient as soon as it is computed.

If a model's blocks are on disk, or it is on a GPU, all sequences go through one decoder block after another
(`samq.sensitivity.block_pass`). So no more than a block's weights need to be in memory, and batches may be large. On a CPU a
model that is in memory runs whole, batch by batch. That computes nothing twice and takes four fifths of the time. Models that
do not come apart into blocks run whole, too.
"""

import logging
import time

import numpy as np
import torch
from transformers import PreTrainedModel

from samq.data.tokens import TokenBatch
from samq.errors import SamqError
from samq.progress import Progress, silent
from samq.sensitivity.block_pass import BlockPass, Work, batched, deterministic
from samq.sensitivity.blocks import PROBE_TOKENS, Blocks, main_device
from samq.sensitivity.gradients import SampleGradients
from samq.sensitivity.layout import Weight
from samq.sensitivity.loss import Labelling, Loss
from samq.sensitivity.memory import UNLIMITED, Memory
from samq.sensitivity.offloading import has_offloaded
from samq.sensitivity.reduction import Reduce, Sums
from samq.sensitivity.resume import Checkpoints

logger = logging.getLogger(__name__)
SAVE_EVERY_S = 30.0  # what a killed pass of a whole model loses


def backpropagate(
    model: PreTrainedModel,
    tokens: TokenBatch,
    weights: list[Weight],
    reduce: Reduce,
    *,
    labelling: Labelling,
    batch_size: int = 1,
    memory: Memory = UNLIMITED,
    progress: Progress = silent,
) -> tuple[np.ndarray, Sums]:
    """Reduce the gradient of each sequence's summed loss to what `reduce` keeps of it.

    Args:
        model: in any floating-point type, on any device; the function puts it in eval mode.
        tokens: sequences of at least two tokens.
        weights: the model's, from `samq.sensitivity.layout.weights_of`.
        reduce: computes what is kept.
        labelling: the labels of the loss.
        batch_size: sequences a pass. For models with weights outside linear layers and experts (GPT-2) it is 1.
        memory: what it may use. In its folder a run that was killed goes on about where it was.
        progress: told of the blocks that are done, there and back, or of the batches if the model goes through whole.

    Returns:
        The summed losses in nats, (N,) in float64, and what is kept.

    Raises:
        SamqError: NaN or Inf in a loss or in the numbers (names the tensor and the sequence), or too little GPU memory.
    """
    model.eval()  # no dropout
    sums = Sums(len(weights), len(tokens), reduce)
    gradients = SampleGradients(model, weights, sums.receive)
    blocks = _blocks_of(model, gradients) if _goes_by_blocks(model) else None
    if not has_offloaded(model):
        probe = torch.arange(PROBE_TOKENS, device=model.device)[None]
        gradients.require_calls(lambda: model(input_ids=probe, use_cache=False), model)
    loss = Loss(tokens, weights, labelling)
    with gradients:
        work = Work(gradients, sums, loss, batched(tokens, 1 if gradients.one_sample_only else batch_size), progress)
        if blocks is None:
            _whole(model, work, Checkpoints(memory.folder))
        else:
            BlockPass(blocks, work, memory).run()
    _check(sums.numbers(), weights, labelling)
    return loss.summed(), sums


def _goes_by_blocks(model: PreTrainedModel) -> bool:
    """Whether all sequences go through one block after another."""
    return main_device(model).type == "cuda" or has_offloaded(model)


def _blocks_of(model: PreTrainedModel, gradients: SampleGradients) -> Blocks | None:
    """The blocks that the model is measured by, or None."""
    blocks = Blocks.of(model)
    if blocks is not None and (name := gradients.not_hooked_outside(blocks.layers)):
        logger.info("%s is measured whole: the gradient of %s is autograd's own", type(model).__name__, name)
        return None
    return blocks


def _whole(model: PreTrainedModel, work: Work, checkpoints: Checkpoints) -> None:
    """Batch after batch through the whole model; goes on where a killed pass was, half a minute earlier at most."""
    done, saved = 0, time.monotonic()
    if checkpoints.has("whole"):
        state = checkpoints.load("whole")
        done = int(state.pop("done"))
        work.sums.restore(state)
        work.loss.restore(state)
    for number, sequences in enumerate(work.batches[done:], start=done):
        batch = sequences.batch
        with sequences.memory(), deterministic(model.device), work.gradients.within(model, batch) as backward:
            ids, mask = sequences.on(model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            gradient = torch.zeros_like(logits)
            for row, length in enumerate(batch.lengths):
                gradient[row, :length] = work.loss.gradient(batch.first + row, logits[row, :length].detach())
            work.loss.require_finite(range(batch.first, batch.first + len(batch.lengths)))
            backward(logits, gradient)
            del logits, gradient  # the graph, before the next forward pass
        work.progress(number + 1, len(work.batches))
        if time.monotonic() - saved >= SAVE_EVERY_S:
            state = {"done": torch.tensor(number + 1)} | work.sums.changes() | work.loss.state()
            checkpoints.save("whole", state)
            saved = time.monotonic()
    checkpoints.clear()


def _check(numbers: np.ndarray, weights: list[Weight], labelling: Labelling) -> None:
    not_finite = np.argwhere(~np.isfinite(numbers).all(axis=2))
    if len(not_finite):
        # NaN and Inf spread from the output towards the input, so the last weight is the nearest to their source.
        index, sample = not_finite[-1]
        raise SamqError(
            f"the gradient of {weights[index].name} on {labelling.purpose} sequence {labelling.first_sequence + sample} is NaN "
            "or Inf; load the model in float32, or leave that text out"
        )
