"""Rounding to the nearest values: tensors of a full-precision GGUF in other types, with the bytes that llama-quantize writes.

Nothing is written to disk. So what a type costs, and what compensated rounding starts from, need no file.
"""

import math
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, ReaderTensor
from numpy.typing import NDArray

from samq.errors import SamqError
from samq.gguf.file import as_float, open_gguf, read_tensors
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

    def weights(self, name: str, rows: slice) -> NDArray[np.float32]:
        """Some rows of a tensor in full precision, (rows, row length)."""
        tensor = self._tensors[name]
        return as_float(tensor, self._stored(tensor, rows))

    def blocks(self, name: str, kind: str, rows: slice) -> NDArray[np.uint8]:
        """Some rows of a tensor in a type: its blocks, (rows, bytes of a row); as they are if the file has it in that type."""
        tensor = self._tensors[name]
        if tensor.tensor_type.name == kind:
            return self._stored(tensor, rows).view(np.uint8)
        return self.rounded(name, kind, rows, self.weights(name, rows))

    def rounded(self, name: str, kind: str, rows: slice, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The same from the rows' `weights`, for who has them already."""
        importance = self._importance.get(name)
        of_one = self._infos[name].shape[-2] if len(self._infos[name].shape) > 1 else 1  # rows of an expert
        start, stop, _ = rows.indices(self.rows(name))
        parts, row = [empty_blocks(GGMLQuantizationType[kind], 0, weights.shape[1])], start
        while row < stop:
            expert = row // of_one
            end = min(stop, (expert + 1) * of_one)
            columns = None if importance is None else importance[expert]
            parts.append(quantize_rows(GGMLQuantizationType[kind], weights[row - start : end - start], columns))
            row = end
        return np.concatenate(parts)

    def _stored(self, tensor: ReaderTensor, rows: slice) -> np.ndarray:
        """Rows as the file has them. Not through the memory map, whose pages would stay in memory."""
        data = tensor.data.reshape(-1, tensor.data.shape[-1])
        start, stop, _ = rows.indices(len(data))
        shape = stop - start, data.shape[1]
        offset = int(tensor.data_offset) + start * data.strides[0]
        stored = np.fromfile(self._file, data.dtype, math.prod(shape), offset=offset)
        if len(stored) != math.prod(shape):
            raise SamqError(f"{self._file} ends within {tensor.name}; copy or convert it again")
        return stored.reshape(shape)
