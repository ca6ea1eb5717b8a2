"""How much the loss feels each weight tensor: gradient norms, and the Fisher information that prices a change.

One pass over the calibration sequences gives both. With g the gradient of one sequence's summed loss,

    gradient norm   the founding method: L2 norm of the gradient of the sequence's mean loss, |g| / its label tokens;
                    mean over sequences, and its standard error; divided by the largest it is the score
    fisher          sum over sequences of g^2, over all label tokens, in nats per token per squared weight. Replacing
                    W by W + dW then costs about sum(fisher * dW^2) / 2 in nats per token (the second-order term of
                    the KL divergence, without the terms between weights); true Fisher information with labels drawn
                    from the model, the empirical one with those of the text

Of the Fisher information the means over rows and over columns are kept (samq.sensitivity.fisher).
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from transformers import PreTrainedModel

from samq.data.tokens import TokenBatch
from samq.errors import SamqError
from samq.progress import Progress, silent
from samq.records import SensitivityMap, TensorSensitivity
from samq.sensitivity.backpropagation import Labels, backpropagate
from samq.sensitivity.fisher import Fisher
from samq.sensitivity.layout import Weight, weights_of


def measure_sensitivity(
    model: PreTrainedModel,
    tokens: TokenBatch,
    *,
    names: Callable[[str], str | None],
    model_digest: str,
    calibration_digest: str,
    row_orders: Mapping[str, np.ndarray] | None = None,
    batch_size: int = 1,
    labels: Labels = "text",
    second_moment: bool = True,
    seed: int = 0,
    first_sequence: int = 0,
    progress: Progress = silent,
) -> tuple[SensitivityMap, dict[str, Fisher] | None]:
    """Measure every weight matrix of a causal LM on the sequences of `tokens`.

    Args:
        model: in any floating type, on any device; gradients are accumulated in float32 or wider.
        tokens: at least two sequences, for a standard error.
        names: torch's parameter name -> GGUF's, see `samq.gguf.file.gguf_names`.
        model_digest: of the ModelSource, kept in the map.
        calibration_digest: of the CalibrationSet, kept in the map.
        row_orders: see `samq.sensitivity.layout.row_orders`; the fisher's rows are put in GGUF's order.
        batch_size: sequences a pass; the figures do not depend on it but for rounding. Models with weights outside
            linear layers (GPT-2, mixtures of experts) are measured one sequence at a time.
        labels: next tokens of the text, or drawn from the model's distribution at the same positions, from a random
            stream of its own for each (seed, sequence).
        second_moment: also return the fisher.
        seed: of the drawn labels.
        first_sequence: number of the first of these sequences among all that are measured, for the random streams.
        progress: told of sequences done.

    Returns:
        The map, and GGUF name -> fisher; None without `second_moment`.

    Raises:
        SamqError: too few sequences, or NaN or Inf in a loss or gradient, with the tensor and the sequence, or too
            little GPU memory.
    """
    if len(tokens) < 2:
        raise SamqError(f"sensitivity needs at least 2 calibration sequences, not {len(tokens)}; give more text")
    weights = weights_of(model, names)
    sums = _Sums(weights, second_moment)
    losses, reduced = backpropagate(
        model,
        tokens,
        weights,
        sums.add,
        numbers=1,
        labels=labels,
        stream=lambda sequence: np.random.default_rng((seed, sequence)),
        text="calibration",
        first_sequence=first_sequence,
        batch_size=batch_size,
        progress=progress,
    )
    label_tokens = tokens.lengths.astype(np.int64) - 1
    squares = dict(zip((weight.name for weight in weights), reduced[..., 0], strict=True))
    shapes = {weight.name: weight.shape for weight in weights}
    return (
        SensitivityMap(
            model_digest=model_digest,
            calibration_digest=calibration_digest,
            labels=labels,
            seed=seed,
            sequence_tokens=tuple(label_tokens.tolist()),
            loss_nats=float(losses.sum() / label_tokens.sum()),
            tied_embeddings="output.weight" not in squares,
            tensors=_sensitivities(shapes, squares, label_tokens, second_moment),
        ),
        sums.fisher(int(label_tokens.sum()), row_orders or {}) if second_moment else None,
    )


def merge(
    first: tuple[SensitivityMap, Mapping[str, Fisher]], more: tuple[SensitivityMap, Mapping[str, Fisher]]
) -> tuple[SensitivityMap, dict[str, Fisher]]:
    """Two measurements (map, fisher) of one model on different sequences as one, as if all had been measured together."""
    (one, one_fisher), (other, other_fisher) = first, more
    tokens = one.tokens + other.tokens
    squares = {
        name: np.array(tensor.sequence_squares + other.tensors[name].sequence_squares)
        for name, tensor in one.tensors.items()
    }
    shapes = {name: tensor.shape for name, tensor in one.tensors.items()}
    sequence_tokens = one.sequence_tokens + other.sequence_tokens
    whole = one.model_copy(
        update={
            "sequence_tokens": sequence_tokens,
            "loss_nats": (one.loss_nats * one.tokens + other.loss_nats * other.tokens) / tokens,
            "tensors": _sensitivities(shapes, squares, np.array(sequence_tokens), True),
        }
    )
    fisher = {
        name: part.mixed(one.tokens / tokens, other_fisher[name], other.tokens / tokens)
        for name, part in one_fisher.items()
    }
    return whole, fisher


def _sensitivities(
    shapes: Mapping[str, tuple[int, ...]],
    squares: Mapping[str, np.ndarray],
    label_tokens: np.ndarray,
    second_moment: bool,
) -> dict[str, TensorSensitivity]:
    """GGUF name -> record, from `squares` (sequences,): squared gradient norms of the sequences' summed losses."""
    norms = {name: np.sqrt(values) / label_tokens for name, values in squares.items()}
    largest = max(values.mean() for values in norms.values())
    if not largest:
        raise SamqError("all gradients are zero: the loss does not depend on the weights; check the model's weights")
    return {
        name: TensorSensitivity(
            shape=shape,
            gradient_norm=norms[name].mean(),
            gradient_norm_stderr=norms[name].std(ddof=1) / np.sqrt(len(label_tokens)),
            score=norms[name].mean() / largest,
            fisher=squares[name].sum() / label_tokens.sum() / math.prod(shape) if second_moment else None,
            sequence_squares=tuple(squares[name].tolist()),
        )
        for name, shape in shapes.items()
    }


class _Sums:
    """Sums of squared gradients of each row and each column of every weight, over all sequences."""

    def __init__(self, weights: list[Weight], second_moment: bool) -> None:
        self.weights = weights
        self._rows: list[torch.Tensor] = []  # (rows of all experts,)
        self._columns: list[torch.Tensor] = []  # (row length,), experts first when stacked
        if second_moment:
            for weight in weights:
                *experts, rows, columns = weight.shape
                device = weight.parameter.device
                self._rows.append(torch.zeros(math.prod(experts) * rows, device=device))
                self._columns.append(torch.zeros(*experts, columns, device=device))

    def add(self, index: int, row: int, gradient: torch.Tensor) -> torch.Tensor:
        """Take some rows of a sequence's gradient, all of them when stacked, and overwrite them.

        Returns their sum of squares, in nats^2 per squared weight.
        """
        # A norm is taken in one pass over the gradient, without a copy; its square is the sum of squares.
        squares = torch.linalg.vector_norm(gradient, dim=1).square_()
        if self._rows:
            self._rows[index][row : row + len(squares)] += squares
            columns = self._columns[index]
            columns += gradient.square_().view(*columns.shape[:-1], -1, columns.shape[-1]).sum(-2)
        return squares.sum(dtype=torch.float64)

    def fisher(self, label_tokens: int, row_orders: Mapping[str, np.ndarray]) -> dict[str, Fisher]:
        """GGUF name -> fisher, in GGUF's order of rows."""
        result = {}
        for weight, row_sums, column_sums in zip(self.weights, self._rows, self._columns, strict=True):
            *experts, rows, columns = weight.shape
            means = (row_sums / (columns * label_tokens)).cpu().numpy()
            if weight.name in row_orders:
                means = means[row_orders[weight.name]]
            by_column = (column_sums / (rows * label_tokens)).cpu().numpy()
            result[weight.name] = Fisher(means.reshape(*experts, rows), by_column)
        return result
