"""Gradients of one weight matrix, one for each sequence of a batch, in the form in which backpropagation gives them.

The gradient of a linear layer's weights is dY^T X, of its output's gradient dY (T, out) and its input X (T, in). It is as
large as the weights. What SAMQ needs of it is smaller: the sums of its squares over rows and columns. They follow from products
of tokens with tokens, without the gradient itself (as in Goodfellow 2015, arXiv:1510.01799, for its norm):

    sums over columns, for each row    sum over t, s of dY[t, row] (X X^T)[t, s] dY[s, row]
    sums over rows, for each column    sum over t, s of X[t, column] (dY dY^T)[t, s] X[s, column]

That is less work wherever there are fewer tokens than rows and columns, and less memory always.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

BAND_WEIGHTS = 2**22  # weights of one band of a gradient: 16 MiB in float32

Rows = slice | torch.Tensor  # some rows of a weight, by their numbers; those of stacked experts are numbered through


class Gradients(ABC):
    """The gradients of one weight on the sequences of a batch, or of some of its rows."""

    @abstractmethod
    def zeros(self, numbers: int) -> torch.Tensor:
        """(sequences, numbers) zeros in float64, on the gradients' device."""

    @abstractmethod
    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of squares of each sequence's gradient, in float32.

        Returns:
            Of each row, (sequences, rows of all experts), and of each column, (sequences, row length) or
            (sequences, experts, row length).
        """

    @abstractmethod
    def bands(self) -> Iterator[tuple[int, Rows, torch.Tensor]]:
        """(number in the batch, rows, those rows of that sequence's gradient in float32), some rows at a time.

        Rows that no band has are zero. Whoever takes a band may overwrite it.
        """


@dataclass(frozen=True)
class LinearGradients(Gradients):
    """Of a weight that linear layers use: dY^T X of each sequence."""

    inputs: torch.Tensor  # X, (sequences, T, row length)
    outputs: torch.Tensor  # dY, (sequences, T, rows); zero past a sequence's end

    def zeros(self, numbers: int) -> torch.Tensor:
        """See `Gradients`."""
        return self.inputs.new_zeros(len(self.inputs), numbers, dtype=torch.float64)

    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Gradients`."""
        tokens, columns, rows = *self.inputs.shape[1:], self.outputs.shape[2]
        # On a GPU, a gradient's way through the memory takes longer than its product.
        if (1 if self.inputs.is_cuda else 2) * tokens * (rows + columns) <= rows * columns:
            with _tf32(self.inputs):
                return (
                    _squared_sums(self.outputs, _product(self.inputs, self.inputs.mT)),
                    _squared_sums(self.inputs, _product(self.outputs, self.outputs.mT)),
                )
        by_row = self.inputs.new_zeros(len(self.inputs), rows, dtype=torch.float32)
        by_column = self.inputs.new_zeros(len(self.inputs), columns, dtype=torch.float32)
        for sample, band, gradient in self.bands():
            by_row[sample, band] = torch.linalg.vector_norm(gradient, dim=1).square_()  # one pass, and no copy
            by_column[sample] += gradient.square_().sum(0)
        return by_row, by_column

    def bands(self) -> Iterator[tuple[int, Rows, torch.Tensor]]:
        """See `Gradients`."""
        rows, columns = self.outputs.shape[2], self.inputs.shape[2]
        step = max(1, BAND_WEIGHTS // columns)
        for sample, (layer_input, gradient) in enumerate(zip(self.inputs, self.outputs, strict=True)):
            for first in range(0, rows, step):
                band = slice(first, min(first + step, rows))
                yield sample, band, _product(gradient[None, :, band].mT, layer_input[None])[0]


@dataclass(frozen=True)
class RowGradients(Gradients):
    """Of some rows of a weight, those of a sequence's tokens: an embedding's."""

    shape: tuple[int, int]  # of the weight
    batch: tuple[int, int]  # the sequence's number in its batch, and the batch's size
    rows: torch.Tensor  # (R,) int64, each once
    gradient: torch.Tensor  # (R, row length) float32

    def zeros(self, numbers: int) -> torch.Tensor:
        """See `Gradients`."""
        return self.gradient.new_zeros(self.batch[1], numbers, dtype=torch.float64)

    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Gradients`."""
        sample, samples = self.batch
        squares = self.gradient.square()
        by_row = squares.new_zeros(samples, self.shape[0])
        by_column = squares.new_zeros(samples, self.shape[1])
        by_row[sample, self.rows] = squares.sum(1)
        by_column[sample] = squares.sum(0)
        return by_row, by_column

    def bands(self) -> Iterator[tuple[int, Rows, torch.Tensor]]:
        """See `Gradients`."""
        yield self.batch[0], self.rows, self.gradient.clone()


@dataclass(frozen=True)
class WholeGradient(Gradients):
    """Autograd's own, of a batch of one sequence."""

    gradient: torch.Tensor  # (rows, row length), experts first if stacked

    def zeros(self, numbers: int) -> torch.Tensor:
        """See `Gradients`."""
        return self.gradient.new_zeros(1, numbers, dtype=torch.float64)

    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Gradients`."""
        squares = self.gradient.float().square()
        return squares.sum(-1).view(1, -1), squares.sum(-2)[None]

    def bands(self) -> Iterator[tuple[int, Rows, torch.Tensor]]:
        """See `Gradients`."""
        flat = self.gradient.reshape(-1, self.gradient.shape[-1])
        step = max(1, BAND_WEIGHTS // flat.shape[1])
        for first in range(0, len(flat), step):
            band = slice(first, min(first + step, len(flat)))
            yield 0, band, flat[band].float().clone()


@dataclass(frozen=True)
class ExpertGradients(Gradients):
    """Of some experts of a stack."""

    shape: tuple[int, ...]  # of the weight, experts first
    experts: list[tuple[int, LinearGradients]]  # their numbers, each once

    def zeros(self, numbers: int) -> torch.Tensor:
        """See `Gradients`."""
        return self.experts[0][1].zeros(numbers)

    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Gradients`."""
        stack, rows, columns = self.shape
        some = self.experts[0][1].inputs
        by_row = some.new_zeros(len(some), stack, rows, dtype=torch.float32)
        by_column = some.new_zeros(len(some), stack, columns, dtype=torch.float32)
        for expert, gradients in self.experts:
            by_row[:, expert], by_column[:, expert] = gradients.squares()
        return by_row.flatten(1), by_column

    def bands(self) -> Iterator[tuple[int, Rows, torch.Tensor]]:
        """See `Gradients`."""
        rows = self.shape[1]
        for expert, gradients in self.experts:
            for sample, band, values in gradients.bands():
                assert isinstance(band, slice)
                yield sample, slice(expert * rows + band.start, expert * rows + band.stop), values


def sum_of_rows(ids: torch.Tensor, gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up the rows of `gradients` (T, d) that have the same id; returns the ids (R,), each once, and the sums (R, d)."""
    rows, places = torch.unique(ids, return_inverse=True)
    sums = gradients.new_zeros(len(rows), gradients.shape[1], dtype=torch.float32)
    return rows, sums.index_add_(0, places, gradients.float())


def _product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Matrix products (N, ., .) in float32; a GPU multiplies 16 bits as they are."""
    if one.is_cuda and one.dtype != torch.float32:
        products: torch.Tensor = torch.bmm(one, other, out_dtype=torch.float32)
        return products
    return one.float() @ other.float()


def _squared_sums(vectors: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Sum over t, s of V[t, j] P[t, s] V[s, j], for each sequence and each j; V is (sequences, T, width)."""
    # float16 would not hold the products, which bfloat16 rounds as it has rounded the vectors
    halves = vectors.is_cuda and vectors.dtype == torch.bfloat16
    sums = _product(products.to(vectors.dtype) if halves else products, vectors if halves else vectors.float())
    return sums.mul_(vectors).sum(1).clamp_(min=0)  # less than 0 by rounding alone


@contextmanager
def _tf32(vectors: torch.Tensor) -> Iterator[None]:
    """Let a GPU multiply by TF32 where the vectors have 16 bits themselves."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before or vectors.dtype != torch.float32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
