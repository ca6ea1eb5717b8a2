"""What the inputs of a model's layers tell before there is a plan: the importance matrix, and what compensation can do."""

from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from samq.data.tokens import TokenBatch
from samq.gguf.formats import EMBEDDING
from samq.gguf.imatrix import ImatrixEntry
from samq.progress import Progress, silent
from samq.quantization.compensation import share_left
from samq.sensitivity.checkpoints import Checkpoints
from samq.sensitivity.gram import Moments, input_moments
from samq.sensitivity.layout import Weight
from samq.sensitivity.memory import UNLIMITED, Memory
from samq.sensitivity.shares import over_devices


@dataclass(frozen=True)
class InputStatistics:
    """Of the layers' inputs, by the GGUF names of their tensors."""

    importance: dict[str, ImatrixEntry] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)  # of the output error, that compensation leaves


def measure_inputs(
    model: PreTrainedModel,
    tokens: TokenBatch,
    weights: list[Weight],
    *,
    shares: bool,
    batch_size: int = 1,
    memory: Memory = UNLIMITED,
    progress: Progress = silent,
) -> InputStatistics:
    """Measure the inputs of all layers on some sequences.

    The output has an entry of importance if its weights are not the embedding's: llama-imatrix does not measure those either.

    Args:
        model, tokens, weights, batch_size: as for `samq.sensitivity.gram.input_moments`.
        shares: whether to measure the shares, which takes whole Gram matrices. Those of stacked experts are not measured.
        memory: what hidden states may take. In its folder a pass that was killed goes on at the block where it was.
        progress: told of the parts that are done.

    Raises:
        SamqError: NaN or Inf in the input of a layer, a Gram matrix that cannot be inverted, or too little memory.
    """
    shapes = {weight.name: weight.shape for weight in weights}
    statistics, kept = InputStatistics(), Checkpoints(memory.folder)
    count = 0
    while kept.has(f"measured-{count:06}"):
        _restore(statistics, kept.load(f"measured-{count:06}"))
        count += 1
    pieces = input_moments(
        model, tokens, weights, matrices=shares, experts=True, batch_size=batch_size, memory=memory, progress=progress
    )
    for piece in pieces:
        new = InputStatistics()
        with_matrix = [moments for moments in piece.moments if shares and moments.gram.ndim == 2]
        left = over_devices(lambda moments, device: share_left(moments.on(device)), with_matrix, memory.devices)
        for moments, share in zip(with_matrix, left, strict=True):
            new.shares.update(dict.fromkeys(moments.tensors, share))
        for moments in piece.moments:
            _add(new, moments, shapes)
        kept.save(f"measured-{count:06}", _state(new))
        statistics.importance.update(new.importance)
        statistics.shares.update(new.shares)
        count += 1
    return statistics


def _add(statistics: InputStatistics, moments: Moments, shapes: dict[str, tuple[int, ...]]) -> None:
    sums = (moments.squares * moments.tokens).cpu().numpy()
    for name in moments.tensors:
        if name == EMBEDDING:
            continue
        matrices = int(np.prod(shapes[name][:-2]))
        if name not in statistics.importance:
            statistics.importance[name] = ImatrixEntry(
                np.zeros((matrices, len(sums)), np.float32), np.zeros(matrices, np.int64)
            )
        entry = statistics.importance[name]
        experts = slice(None) if moments.expert is None else moments.expert
        entry.sums[experts], entry.tokens[experts] = sums, moments.tokens


def _state(statistics: InputStatistics) -> dict[str, torch.Tensor]:
    state = {f"share.{name}": torch.tensor(share, dtype=torch.float64) for name, share in statistics.shares.items()}
    for name, entry in statistics.importance.items():
        state |= {f"sums.{name}": torch.from_numpy(entry.sums), f"tokens.{name}": torch.from_numpy(entry.tokens)}
    return state


def _restore(statistics: InputStatistics, state: dict[str, torch.Tensor]) -> None:
    for key, value in state.items():
        what, name = key.split(".", 1)
        if what == "share":
            statistics.shares[name] = float(value)
        elif what == "sums":
            statistics.importance[name] = ImatrixEntry(value.numpy(), state[f"tokens.{name}"].numpy())
