"""Importance matrices: the mean square of every input of a tensor, by which llama-quantize weighs rounding errors.

llama-quantize takes any numbers. Where all of a tensor are zero no error counts, and it writes a tensor of zeros. So the
entries are checked before the work.
"""

import logging
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from samq.errors import SamqError
from samq.gguf.file import TensorInfo, open_gguf
from samq.gguf.formats import EMBEDDING

logger = logging.getLogger(__name__)

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS = "imatrix.datasets", "imatrix.chunk_count"


@dataclass(frozen=True)
class _Entry:
    """Of one tensor: sums of squares, and the number of tokens that they are of, one number or one for each expert."""

    sums: NDArray[np.float32]
    counts: NDArray[np.float32]


def usable_entries(path: Path, tensors: Mapping[str, TensorInfo]) -> frozenset[str]:
    """Names of the `tensors` for which an importance matrix has an entry that llama-quantize can use.

    The file is a GGUF, or a .dat of an older llama-imatrix. Experts that saw no token are logged; llama-quantize weighs
    their inputs alike. Raises SamqError if the file cannot be read, or if it has entries for none of the tensors. Also if an
    entry has another length than its tensor's rows, is zero for a whole matrix, or holds negative numbers, NaN or infinity.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    return _usable_entries(path, status.st_size, status.st_mtime_ns, tuple(tensors.values()))


@dataclass(frozen=True)
class Description:
    """What an importance matrix says of itself."""

    dataset: str | None  # the first that it names
    entries: int
    chunks: int  # of text; 0 if it does not say


def read_description(path: Path) -> Description:
    """Read what llama-quantize notes of an importance matrix; raises SamqError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                file.seek(0)
                return _dat_description(file)
        fields = open_gguf(path).fields
        names = fields[_DATASETS].contents() if _DATASETS in fields else []
        chunks = int(fields[_CHUNKS].contents()) if _CHUNKS in fields else 0
        return Description(str(names[0]) if names else None, sum(1 for _ in _entries(path)), chunks)
    except (OSError, ValueError, struct.error) as error:
        raise _unreadable(path, error) from error


def _dat_description(file: BinaryIO) -> Description:
    """Of a .dat, after its entries: the number of calls, and the length of the dataset's name and the name, if at all."""
    entries = sum(1 for _ in _dat_entries(file))
    rest = file.read()
    if len(rest) < 8:
        return Description(None, entries, struct.unpack("<i", rest[:4])[0] if len(rest) >= 4 else 0)
    calls, length = struct.unpack("<ii", rest[:8])
    return Description(rest[8 : 8 + length].decode() if length > 0 else None, entries, calls)


@dataclass
class ImatrixEntry:
    """The sums of squares of one tensor's inputs, (matrices, row length), and the tokens that they are of, (matrices,)."""

    sums: NDArray[np.float32]
    tokens: NDArray[np.int64]


def write_imatrix(
    path: Path, entries: Mapping[str, ImatrixEntry], *, dataset: str, sequences: int, sequence_tokens: int
) -> None:
    """Write an importance matrix as llama-imatrix does, with the number of sequences and the length of the longest.

    Raises SamqError if it cannot be written.
    """
    try:
        writer = GGUFWriter(path, "")
        writer.add_type("imatrix")
        writer.add_array(_DATASETS, [dataset])
        writer.add_uint32(_CHUNKS, sequences)
        writer.add_uint32("imatrix.chunk_size", sequence_tokens)
        for name, entry in sorted(entries.items()):
            sums, counts = entry.sums, entry.tokens.astype(np.float32)[:, None]
            writer.add_tensor(name + _SUMS, sums if len(sums) > 1 else sums[0])
            writer.add_tensor(name + _COUNTS, counts if len(counts) > 1 else counts[0])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        raise SamqError(f"cannot write {path}: {error.strerror}; choose a folder that can be written to") from error


def importances(path: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, NDArray[np.float32]]:
    """Tensor -> the importance of its columns as llama-quantize takes it from the file, (experts, row length).

    That is the mean of the squares, and ones for an expert that saw no token. Tensors without a usable entry are left out.
    Raises SamqError as `usable_entries` does.
    """
    usable = usable_entries(path, tensors)
    means = {}
    for name, entry in _entries(path):
        if name in usable:
            sums = entry.sums.reshape(len(entry.counts) if len(entry.counts) > 1 else 1, -1)
            counts = entry.counts[:, None]
            # as load_imatrix in llama.cpp's tools/quantize/quantize.cpp
            with np.errstate(divide="ignore", invalid="ignore"):
                mean = np.where(counts > 0, sums / counts, np.float32(1)).astype(np.float32)
            means[name] = mean.reshape(math.prod(tensors[name].shape[:-2]), -1)
    return means


def expert_tokens(path: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, NDArray[np.int64]]:
    """Stacked tensor -> the tokens that each expert saw, (experts,); without tensors for which the file does not say it.

    Raises SamqError as `usable_entries` does.
    """
    usable = usable_entries(path, tensors)
    return {
        name: entry.counts.astype(np.int64)
        for name, entry in _entries(path)
        if name in usable and len(entry.counts) > 1
    }


@lru_cache(maxsize=8)  # every stage that opens the target asks again
def _usable_entries(path: Path, size: int, mtime_ns: int, tensors: tuple[TensorInfo, ...]) -> frozenset[str]:
    infos = {tensor.name: tensor for tensor in tensors}
    faults: dict[str, list[str]] = {}
    unseen: dict[str, list[int]] = {}
    usable = set()
    for name, entry in _entries(path):
        # llama-quantize ignores an entry of the embedding that has another length
        if (tensor := infos.get(name)) is None or (name == EMBEDDING and len(entry.sums) != tensor.row_length):
            continue
        usable.add(name)
        if fault := _fault(entry, tensor):
            faults.setdefault(fault, []).append(name)
        elif without := _unseen_experts(entry):
            unseen[name] = without
    if faults:
        fault, names = next(iter(faults.items()))
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise SamqError(
            f"the importance matrix {path} cannot be used: for {min(names)}{more} {fault}; measure it again on this model "
            "and its own kind of text with `samq imatrix`"
        )
    if infos and not usable:
        raise SamqError(
            f"the importance matrix {path} has no entry for any tensor of this model; give the one measured on it"
        )
    _log_unseen(path, unseen)
    return frozenset(usable)


def _fault(entry: _Entry, tensor: TensorInfo) -> str:
    """Why llama-quantize cannot use an entry, or would write nonsense; empty if it can."""
    matrices = math.prod(tensor.shape[:-2])
    needed = matrices * tensor.row_length
    if len(entry.sums) != needed or len(entry.counts) not in (1, matrices):
        experts = f"{matrices} experts with rows of {tensor.row_length}" if matrices > 1 else f"rows of {needed}"
        return f"it has {len(entry.sums)} values and the tensor has {experts}"
    sums, seen = entry.sums.reshape(matrices, -1), np.broadcast_to(entry.counts > 0, matrices)
    if not np.isfinite(entry.sums).all() or not np.isfinite(entry.counts).all():
        return "it holds NaN or infinity"
    if (entry.sums < 0).any():
        return "it holds negative numbers, which a sum of squares cannot be"
    zero = np.flatnonzero(seen & ~sums.any(axis=1))
    if len(zero):
        of_experts = f" of expert{'s' if len(zero) > 1 else ''} {_listed(zero)}" if matrices > 1 else ""
        return f"all values{of_experts} are zero, so that llama-quantize would write zeros"
    return ""


def _unseen_experts(entry: _Entry) -> list[int]:
    return [int(expert) for expert in np.flatnonzero(entry.counts <= 0)]


def _log_unseen(path: Path, unseen: Mapping[str, list[int]]) -> None:
    if unseen:
        name = min(unseen)
        logger.warning(
            "%s: %d tensors have experts that saw no token, such as %s (experts %s): llama-quantize weighs their inputs "
            "alike; more text reaches more experts",
            path.name,
            len(unseen),
            name,
            _listed(unseen[name]),
        )


def _listed(numbers: Iterable[int]) -> str:
    """`1, 5, 9`; of more than eight the first eight and how many are left."""
    numbers = list(numbers)
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return ", ".join(map(str, numbers[:8])) + more


def _entries(path: Path) -> Iterator[tuple[str, _Entry]]:
    """Yield tensor name and entry; raises SamqError if the file cannot be read."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                file.seek(0)
                yield from _dat_entries(file)
                return
        arrays = {tensor.name: tensor.data for tensor in open_gguf(path).tensors}
        for name, sums in arrays.items():
            if name.endswith(_SUMS):
                stem = name.removesuffix(_SUMS)
                if stem + _COUNTS not in arrays:
                    raise ValueError(f"no counts for {stem}")
                yield stem, _Entry(sums.ravel(), arrays[stem + _COUNTS].ravel())
    except (OSError, ValueError, struct.error) as error:
        raise _unreadable(path, error) from error


def _dat_entries(file: BinaryIO) -> Iterator[tuple[str, _Entry]]:
    """Yield the entries of a .dat. Experts that saw no token have ones there.

    The file has the number of entries. Then come, for each: the length of the name, the name, the number of calls, the number of
    values, and the values.
    """
    left = os.fstat(file.fileno()).st_size
    (count,) = struct.unpack("<i", file.read(4))
    for _ in range(count):
        (length,) = struct.unpack("<i", file.read(4))
        name = file.read(max(length, 0)).decode()
        calls, values = struct.unpack("<ii", file.read(8))
        if not 0 <= 4 * values <= left:
            raise ValueError(f"{values} values for {name}")
        sums = np.frombuffer(file.read(4 * values), "<f4")
        if len(sums) != values:
            raise ValueError(f"{len(sums)} of {values} values for {name}")
        yield name, _Entry(sums, np.array([max(calls, 1)], np.float32))


def _unreadable(path: Path, error: Exception) -> SamqError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return SamqError(f"cannot read the importance matrix {path} ({reason}); check the path, or measure it again")
