"""Rounding to the nearest values: tensors of a full-precision GGUF in other types, with the bytes that llama-quantize writes.

Nothing is written to disk. So what a type costs, and what compensated rounding starts from, need no file.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, ReaderTensor
from numpy.typing import NDArray

from samq.errors import SamqError
from samq.gguf.file import Rows, as_float, open_gguf, read_tensors
from samq.gguf.ggml import empty_blocks, quantize_rows
from samq.gguf.imatrix import importances


class NearestRounding:
    """The tensors of a full-precision GGUF, rounded with the weights of an importance matrix, or with equal ones."""

    def __init__(self, full: Path, imatrix: Path | None = None) -> None:
        """Raises SamqError if a file cannot be read, or if llama-quantize could not use the importance matrix."""
        self._file = full
        self._infos = read_tensors(full)
        self._tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in open_gguf(full).tensors}
        self._importance = importances(imatrix, self._infos) if imatrix else {}

    def rows(self, name: str) -> int:
        """How many rows a tensor has, counted through all experts."""
        return math.prod(self._infos[name].shape[:-1])

    def matrices(self, name: str) -> int:
        """How many matrices a tensor has: the number of its experts if they are stacked, or else 1."""
        return math.prod(self._infos[name].shape[:-2])

    @property
    def names(self) -> list[str]:
        """All tensors of the file, in its order."""
        return list(self._infos)

    def kind(self, name: str) -> str:
        """The type of a tensor in full precision."""
        return self._infos[name].type

    def row_length(self, name: str) -> int:
        """How many weights a row of a tensor has."""
        return self._infos[name].row_length

    def weights(self, name: str, rows: Rows) -> NDArray[np.float32]:
        """Some rows of a tensor in full precision, (rows, row length)."""
        tensor = self._tensors[name]
        return as_float(tensor, self._stored(tensor, rows))

    def blocks(self, name: str, kind: str, rows: Rows) -> NDArray[np.uint8]:
        """Some rows' blocks in a type, (rows, bytes of a row). They stay as they are if the file has the tensor in that type."""
        tensor = self._tensors[name]
        if tensor.tensor_type.name == kind:
            return self._stored(tensor, rows).view(np.uint8)
        return self.rounded(name, kind, rows, self.weights(name, rows))

    def rounded(self, name: str, kind: str, rows: Rows, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The same from the rows' `weights`, for who has them already."""
        importance = self._importance.get(name)
        of_one = self._infos[name].shape[-2] if len(self._infos[name].shape) > 1 else 1  # rows of an expert
        experts = self._numbers(name, rows) // of_one
        parts = [empty_blocks(GGMLQuantizationType[kind], 0, weights.shape[1])]
        for first, last in _runs(np.diff(experts) != 0, len(experts)):
            columns = None if importance is None else importance[experts[first]]
            parts.append(quantize_rows(GGMLQuantizationType[kind], weights[first:last], columns))
        return np.concatenate(parts)

    def _numbers(self, name: str, rows: Rows) -> NDArray[np.intp]:
        return np.arange(*rows.indices(self.rows(name))) if isinstance(rows, slice) else rows

    def _stored(self, tensor: ReaderTensor, rows: Rows) -> np.ndarray:
        """Rows as the file has them. Not through the memory map, whose pages would stay in memory."""
        numbers = self._numbers(tensor.name, rows)
        data = tensor.data.reshape(-1, tensor.data.shape[-1])
        parts = [np.empty((0, data.shape[1]), data.dtype)]
        with open(self._file, "rb", buffering=0) as file:
            for first, last in _runs(np.diff(numbers) != 1, len(numbers)):
                file.seek(int(tensor.data_offset) + int(numbers[first]) * data.strides[0])
                part = np.fromfile(file, data.dtype, (last - first) * data.shape[1])
                if len(part) != (last - first) * data.shape[1]:
                    raise SamqError(f"{self._file} ends within {tensor.name}; copy or convert it again")
                parts.append(part.reshape(-1, data.shape[1]))
        return parts[1] if len(parts) == 2 else np.concatenate(parts)


def _runs(ends: NDArray[np.bool_], count: int) -> Iterator[tuple[int, int]]:
    """The runs of `count` items, as first and last + 1; `ends` says whether one ends between an item and the next."""
    edges = [0, *(np.flatnonzero(ends) + 1).tolist(), count]
    return pairwise(edges) if count else iter(())
