"""A GGUF's header: read without parsing arrays that nobody asks for, or as bytes that can be written again unchanged.

A vocabulary is hundreds of thousands of strings. gguf's own reader makes two numpy arrays of each, which takes seconds.
The reader here finds where an array ends and parses its values when they are asked for.
"""

import mmap
import struct
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, ReaderField
from gguf.constants import GGUF_DEFAULT_ALIGNMENT
from numpy.typing import NDArray

from samq.errors import SamqError

# struct's letter for each scalar of the format
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_length_at = struct.Struct("<Q").unpack_from
_Buffer = mmap.mmap | memoryview


_TYPE_NUMBERS = frozenset(int(kind) for kind in GGMLQuantizationType)


class UnknownTypeError(ValueError):
    """A tensor's type is not one of ggml's. The message says which and where."""


class LazyReader(GGUFReader):
    """gguf's reader, with arrays of scalars and of strings left unparsed until their values are asked for.

    Bytes of a string that are not UTF-8 become U+FFFD, but for those in arrays: tokens are bytes.
    """

    _is_nested = False  # while the arrays in an array are parsed

    @property  # type: ignore[override]
    def data(self) -> NDArray[np.uint8]:
        """The file's bytes, still mapped."""
        return self._data

    @data.setter
    def data(self, mapped: NDArray[np.uint8]) -> None:
        self._data = np.asarray(mapped)  # np.memmap takes three times as long for a slice
        self._bytes = self._data.data

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[NDArray[Any]], list[int], list[GGUFValueType]]:
        """Size, parts, places of the values in the parts, and types of the value at an offset; no values of an array."""
        if raw_type == GGUFValueType.STRING and not self._is_nested:
            size, parts, places, types = super()._get_field_parts(orig_offs, raw_type)
            return size, [*parts[:-1], _as_utf8(parts[-1])], places, types
        if raw_type != GGUFValueType.ARRAY or self.byte_order == "S" or self._is_nested:
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = struct.unpack_from("<IQ", self._bytes, orig_offs)
        if kind not in _SCALARS and kind != GGUFValueType.STRING:
            self._is_nested = True
            try:
                return super()._get_field_parts(orig_offs, raw_type)
            finally:
                self._is_nested = False
        start = orig_offs + 12
        size = _end_of_values(self._bytes, start, kind, count) - start
        parts = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64), self._get(start, np.uint8, size)]
        types = [GGUFValueType.ARRAY] + ([GGUFValueType(kind)] if count else [])
        return 12 + size, parts, [], types

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        for field in fields:
            kind = int(field.parts[4][0])
            if kind not in _TYPE_NUMBERS:
                raise UnknownTypeError(
                    f"{field.name} has type {kind}, which the pinned gguf package does not know: a fork or a newer "
                    "llama.cpp wrote it"
                )
        super()._build_tensors(start_offs, fields)

    def _push_field(self, field: ReaderField, skip_sum: bool = False) -> int:
        is_unparsed = field.types[:1] == [GGUFValueType.ARRAY] and not field.data
        return super()._push_field(_UnparsedArray(*field) if is_unparsed else field, skip_sum)


class _UnparsedArray(ReaderField):
    """An array whose values are parsed when they are asked for; the last part in the tuple is their bytes.

    A value is a string's bytes or a scalar in a tuple: gguf has numpy arrays there, and its users take either.
    """

    @property
    def parts(self) -> list[Any]:
        """What gguf has there: key, type, type of the values, their number, and each value."""
        return self._parsed

    @property
    def data(self) -> range:  # type: ignore[override]
        """Where the values are in `parts`."""
        return range(len(self[2]) - 1, len(self._parsed))

    def contents(self, index_or_slice: int | slice = slice(None)) -> Any:
        """The values as Python values, or the one at an index."""
        parts = self.parts[self.data.start :]
        if isinstance(index_or_slice, int):
            return _python_value(parts[index_or_slice])
        return [_python_value(part) for part in parts[index_or_slice]]

    @cached_property
    def _parsed(self) -> list[Any]:
        *before, array = self[2]
        content, kind, count, at = array.data, self.types[-1], int(before[-1][0]), 0
        if kind != GGUFValueType.STRING:
            return [*before, *(struct.iter_unpack(f"<{_SCALARS[kind]}", content) if count else ())]
        values = []
        for _ in range(count):
            start = at + 8
            at = start + _length_at(content, at)[0]
            values.append(bytes(content[start:at]))
        return [*before, *values]


def copy_metadata(reader: GGUFReader, writer: GGUFWriter, without: Container[str] = ()) -> None:
    """Give the writer all that a GGUF says of itself, but for the keys in `without`."""
    for name, field in reader.fields.items():
        # The writer has the architecture and the counts of its own.
        if name.startswith("GGUF.") or name == "general.architecture" or name in without:
            continue
        kind = field.types[0]
        writer.add_key_value(name, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)


def _as_utf8(text: NDArray[np.uint8]) -> NDArray[np.uint8]:
    content = text.tobytes()
    return np.frombuffer(content.decode(errors="replace").encode(), np.uint8)


def _python_value(part: bytes | tuple[Any]) -> Any:
    return part.decode() if isinstance(part, bytes) else part[0]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a header lists it: `shape` has the row length last, `offset` counts from the start of the file."""

    shape: tuple[int, ...]
    type: str
    offset: int


@dataclass(frozen=True)
class Header:
    """A GGUF's header with its values as they lie in the file, so that they can be written again unchanged."""

    version: int
    values: dict[str, bytes]  # key -> type and value
    tensors: dict[str, TensorEntry]


def read_header(path: Path, likely: Mapping[str, bytes] | None = None) -> Header:
    """Read the header of a GGUF of version 3 and alignment 32, as llama-quantize writes it.

    `likely` are values of another file (`Header.values`), which are compared as a whole: where they are the same, no
    string of a vocabulary is read. Raises SamqError if the file is damaged.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _parse_header(content, likely or {})
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise SamqError(f"{path} is not a whole GGUF file ({error}); copy or convert it again") from error


def _parse_header(content: mmap.mmap, likely: Mapping[str, bytes]) -> Header:
    if content[:4] != b"GGUF":
        raise ValueError("no GGUF magic")
    version, tensor_count, value_count = struct.unpack_from("<IQQ", content, 4)
    at = 24
    values = {}
    for _ in range(value_count):
        key, at = _read_string(content, at)
        value = likely.get(key, b"")
        if not value or content[at : at + len(value)] != value:  # a value determines its own length
            value = content[at : _end_of_value(content, at)]
        values[key] = value
        at += len(value)
    entries = []
    for _ in range(tensor_count):
        name, at = _read_string(content, at)
        (dimensions,) = struct.unpack_from("<I", content, at)
        shape = struct.unpack_from(f"<{dimensions}Q", content, at + 4)
        kind, offset = struct.unpack_from("<IQ", content, at + 4 + 8 * dimensions)
        at += 16 + 8 * dimensions
        entries.append((name, tuple(reversed(shape)), GGMLQuantizationType(kind).name, offset))
    start = padded(at)
    return Header(
        version, values, {name: TensorEntry(shape, kind, start + offset) for name, shape, kind, offset in entries}
    )


def _end_of_value(content: _Buffer, at: int) -> int:
    """Where the value that starts at `at` with its type ends."""
    kind, at = struct.unpack_from("<I", content, at)[0], at + 4
    if kind != GGUFValueType.ARRAY:
        return _end_of_values(content, at, kind, 1)
    kind, count = struct.unpack_from("<IQ", content, at)
    return _end_of_values(content, at + 12, kind, count)


def _end_of_values(content: _Buffer, at: int, kind: int, count: int) -> int:
    """Where `count` values of one type that start at `at` end; KeyError for an array of arrays."""
    if kind != GGUFValueType.STRING:
        return at + count * struct.calcsize(_SCALARS[GGUFValueType(kind)])
    for _ in range(count):
        at += 8 + _length_at(content, at)[0]
    return at


def _read_string(content: mmap.mmap, at: int) -> tuple[str, int]:
    """The string at `at`, and where it ends."""
    (length,) = _length_at(content, at)
    return content[at + 8 : at + 8 + length].decode(), at + 8 + length


def pack_string(text: str) -> bytes:
    """A string as GGUF has it: its length in bytes, then UTF-8."""
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def padded(size: int) -> int:
    """The next multiple of the alignment that llama-quantize writes."""
    return -(-size // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT
