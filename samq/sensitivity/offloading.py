"""Weights that are not where they are computed with: on disk, or in the host's memory beside a GPU.

A parameter on disk is on torch's meta device, and `keep_on_disk` notes in it where its values are. `samq.sensitivity.residence`
brings them to the devices that compute.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from samq.errors import SamqError
from samq.safetensors_header import read_safetensors_header

logger = logging.getLogger(__name__)

READ_AT_ONCE = 2**25  # bytes of a tensor that a thread reads at a time, whose pages are in memory meanwhile
_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # by their names in safetensors
_STORED = "samq_stored"  # attribute of a parameter that is on disk

Rows = slice | EllipsisType  # some rows of a tensor, or all


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, and the type and device that it is computed with."""

    file: Path
    name: str
    dtype: torch.dtype
    device: torch.device

    @contextmanager
    def opened(self, rows: Rows = ...) -> Iterator[torch.Tensor]:
        """Its values as the file has them, whose pages are in memory as long as the tensor."""
        with safe_open(self.file, "pt") as file:
            yield file.get_tensor(self.name) if rows is ... else file.get_slice(self.name)[rows]

    def read(self, into: torch.Tensor, rows: Rows = ...) -> torch.Tensor:
        """Fill a contiguous tensor in the host's memory with its values, or some rows of them; returns that tensor.

        Values that the file has in the tensor's type are read straight into it, and others are converted.
        """
        status = self.file.stat()
        first_byte, entries = _header(self.file, status.st_mtime_ns, status.st_size)
        entry = entries[self.name]
        if _TYPES.get(entry["dtype"]) != into.dtype or not into.is_contiguous():
            with self.opened(rows) as values:
                return into.copy_(values)
        first = rows.start if isinstance(rows, slice) else 0
        of_row = into[0].nbytes if into.ndim and len(into) else 0
        _read_bytes(self.file, first_byte + entry["data_offsets"][0] + first * of_row, into)
        return into

    def has_values_of(self, other: "StoredTensor", parameter: torch.Tensor) -> bool:
        """Whether two tensors of the parameter's shape are equal."""
        if (self.file, self.name) == (other.file, other.name):
            return True
        for rows in parts_of(parameter):
            with self.opened(rows) as values, other.opened(rows) as others:
                if not torch.equal(values.to(self.dtype), others.to(other.dtype)):
                    return False
        return True


@lru_cache(maxsize=1024)
def _header(file: Path, changed_ns: int, size: int) -> tuple[int, dict[str, Any]]:
    """The header of a file that has this time and size: it is read for every part of a tensor."""
    return read_safetensors_header(file)


def _read_bytes(file: Path, offset: int, into: torch.Tensor) -> None:
    """Fill a tensor with the bytes of a file."""
    left = into.reshape(-1).view(torch.uint8).numpy().data
    with file.open("rb", buffering=0) as content:
        content.seek(offset)
        while left:
            count = content.readinto(left)
            if not count:
                raise SamqError(f"{file} became shorter while it was read; download it again, and run again")
            left = left[count:]


def parts_of(tensor: torch.Tensor) -> Iterator[Rows]:
    """The rows of a tensor on disk that are read at a time."""
    step = max(1, READ_AT_ONCE // max(1, tensor[0].nbytes)) if tensor.ndim and len(tensor) else 0
    if tensor.ndim == 0 or len(tensor) <= step:
        yield ...
        return
    for first in range(0, len(tensor), step):
        yield slice(first, min(first + step, len(tensor)))


def keep_on_disk(parameter: nn.Parameter, stored: StoredTensor) -> None:
    """Note where the values of a parameter on the meta device are."""
    setattr(parameter, _STORED, stored)


def is_offloaded(parameter: torch.Tensor) -> bool:
    """Whether the parameter's values are on disk."""
    return hasattr(parameter, _STORED)


def has_offloaded(module: nn.Module) -> bool:
    """Whether some of the module's weights are on disk."""
    return any(map(is_offloaded, module.parameters()))


def stored_of(parameter: torch.Tensor) -> StoredTensor | None:
    """Where the parameter's values are, if that is on disk."""
    stored: StoredTensor | None = getattr(parameter, _STORED, None)
    return stored


def computes_on(parameter: torch.Tensor) -> torch.device:
    """The device where the parameter is, or which its values are brought to from disk."""
    stored = stored_of(parameter)
    return parameter.device if stored is None else stored.device


def values_of(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter's values: read into the host's memory if they are on disk, or else where they are."""
    if (stored := stored_of(parameter)) is None:
        return parameter.detach()
    values = torch.empty(parameter.shape, dtype=stored.dtype)
    for rows in parts_of(parameter):
        stored.read(values[rows], rows)
    return values


def bytes_of(parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of the parameters' values in the type that they are computed with."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def without_values(parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Zeros in the parameter's place, which take no memory."""
    return torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
