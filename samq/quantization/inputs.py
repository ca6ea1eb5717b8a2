"""What the inputs of a model's layers tell before there is a plan: the importance matrix, and what compensation can do."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from samq.data.tokens import TokenBatch
from samq.gguf.formats import EMBEDDING
from samq.gguf.imatrix import ImatrixEntry
from samq.progress import Progress, silent
from samq.quantization.compensation import expected_errors
from samq.sensitivity.gram import input_moments
from samq.sensitivity.layout import Weight
from samq.sensitivity.memory import UNLIMITED, Memory
from samq.sensitivity.moments import Moments, Piece
from samq.sensitivity.resume import Checkpoints
from samq.sensitivity.shares import over_devices


@dataclass(frozen=True)
class InputStatistics:
    """Of the layers' inputs, by the GGUF names of their tensors."""

    importance: dict[str, ImatrixEntry] = field(default_factory=dict)
    # The whole output error and what compensation leaves of it, by matrix, (matrices, 2), in units of the columns' errors
    errors: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def shares(self) -> dict[str, float]:
        """The share of a tensor's output error that compensation leaves, over the tokens of all its experts."""
        sums = {name: errors.sum(axis=0) for name, errors in self.errors.items()}
        return {name: float(left / whole) for name, (whole, left) in sums.items() if whole}

    def add(self, other: "InputStatistics") -> None:
        """Take what the other one knows, also of some experts of a tensor alone."""
        for name, entry in other.importance.items():
            if known := self.importance.get(name):
                seen = entry.tokens > 0
                known.sums[seen], known.tokens[seen] = entry.sums[seen], entry.tokens[seen]
            else:
                self.importance[name] = entry
        for name, errors in other.errors.items():
            known_errors = self.errors.setdefault(name, np.zeros_like(errors))
            known_errors[errors.any(axis=1)] = errors[errors.any(axis=1)]


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
        shares: whether to measure the shares, which takes whole Gram matrices.
        memory: what hidden states may take. In its folder a pass that was killed goes on at the block where it was.
        progress: told of the parts that are done.

    Raises:
        SamqError: NaN or Inf in the input of a layer, a Gram matrix that cannot be inverted, or too little memory.
    """
    shapes = {weight.name: weight.shape for weight in weights}
    statistics, kept = InputStatistics(), Checkpoints(memory.folder)
    count = 0
    while kept.has(f"measured-{count:06}"):
        statistics.add(_of_state(kept.load(f"measured-{count:06}")))
        count += 1
    pieces = input_moments(
        model, tokens, weights, matrices=shares, batch_size=batch_size, memory=memory, progress=progress
    )
    for piece in pieces:
        new = _measured(piece, shapes, memory)
        del piece  # its matrices, before those of the next one come
        kept.save(f"measured-{count:06}", _state(new))
        statistics.add(new)
        count += 1
    return statistics


def _measured(piece: Piece, shapes: dict[str, tuple[int, ...]], memory: Memory) -> InputStatistics:
    statistics = InputStatistics()
    errors = over_devices(_errors_of, piece.moments, memory.devices)
    for moments, of_one in zip(piece.moments, errors, strict=True):
        _add(statistics, moments, of_one, shapes)
    return statistics


def _errors_of(moments: Moments, device: torch.device | None) -> tuple[float, float] | None:
    return expected_errors(moments.on(device)) if moments.gram.ndim == 2 else None


def _add(
    statistics: InputStatistics,
    moments: Moments,
    errors: tuple[float, float] | None,
    shapes: dict[str, tuple[int, ...]],
) -> None:
    sums = (moments.squares * moments.tokens).cpu().numpy()
    for name in moments.tensors:
        matrices = math.prod(shapes[name][:-2])
        here = slice(None) if moments.expert is None else moments.expert
        if errors:
            statistics.errors.setdefault(name, np.zeros((matrices, 2)))[here] = errors
        if name != EMBEDDING:
            entry = statistics.importance.setdefault(
                name, ImatrixEntry(np.zeros((matrices, len(sums)), np.float32), np.zeros(matrices, np.int64))
            )
            entry.sums[here], entry.tokens[here] = sums, moments.tokens


def _state(statistics: InputStatistics) -> dict[str, torch.Tensor]:
    state = {f"errors.{name}": torch.from_numpy(errors) for name, errors in statistics.errors.items()}
    for name, entry in statistics.importance.items():
        state |= {f"sums.{name}": torch.from_numpy(entry.sums), f"tokens.{name}": torch.from_numpy(entry.tokens)}
    return state


def _of_state(state: dict[str, torch.Tensor]) -> InputStatistics:
    arrays = {key: value.numpy() for key, value in state.items()}
    names = {key.split(".", 1)[1] for key in arrays if key.startswith("sums.")}
    return InputStatistics(
        {name: ImatrixEntry(arrays[f"sums.{name}"], arrays[f"tokens.{name}"]) for name in names},
        {key.split(".", 1)[1]: value for key, value in arrays.items() if key.startswith("errors.")},
    )
