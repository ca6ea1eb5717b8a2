"""A plan's GGUF, written tensor by tensor in any order.

The header comes first: all sizes follow from the plan. llama-quantize writes the same header for the same plan. It also writes
the same file if the tensors are rounded to the nearest values (samq.gguf.nearest).
"""

import os
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, LlamaFileType
from numpy.typing import NDArray

from samq.errors import SamqError
from samq.gguf.file import require_alignment, without_ones
from samq.gguf.formats import tensor_bytes
from samq.gguf.header import pack_string, padded, read_header
from samq.gguf.imatrix import read_description
from samq.records import Plan

_GGUF_VERSION = 3
_OF_PARTS = ("split.no", "split.count", "split.tensors.count")
_LONGEST_VALUE = 127  # bytes of a string that llama-quantize takes of the importance matrix's description
_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class PlannedFile:
    """A GGUF whose tensors are written where its header says they are."""

    path: Path
    types: Mapping[str, str]  # of all tensors
    _offsets: Mapping[str, int]
    _row_bytes: Mapping[str, int]

    @classmethod
    def create(
        cls, path: Path, full: Path, plan: Plan, metadata: Mapping[str, str], imatrix: Path | None = None
    ) -> Self:
        """Write the header and make room for the tensors of a plan; what a killed process wrote there before stays.

        Args:
            path: the file to write.
            full: the full-precision GGUF that the plan is for.
            plan: its types.
            metadata: the `samq.*` values to add.
            imatrix: the importance matrix that the tensors are rounded with, which the metadata describe.

        Raises:
            SamqError: the file cannot be written, or llama-quantize would not keep the alignment of `full`.
        """
        require_alignment(full)
        header = read_header(full)
        types = {name: plan.types.get(name, entry.type) for name, entry in header.tensors.items()}
        shapes = {name: without_ones(entry.shape) for name, entry in header.tensors.items()}
        infos, ends = bytearray(), 0
        offsets = {}
        for name in sorted(header.tensors, key=_order):
            infos += pack_string(name) + struct.pack(
                f"<I{len(shapes[name])}Q", len(shapes[name]), *reversed(shapes[name])
            )
            infos += struct.pack("<IQ", GGMLQuantizationType[types[name]], ends)
            offsets[name] = ends
            ends += padded(tensor_bytes(types[name], shapes[name]))
        values = _values(header.values, plan, metadata, imatrix)
        head = b"GGUF" + struct.pack("<IQQ", _GGUF_VERSION, len(header.tensors), len(values))
        head += b"".join(pack_string(key) + value for key, value in values.items()) + infos
        head += bytes(padded(len(head)) - len(head))
        rows = {name: tensor_bytes(types[name], shape[-1:]) for name, shape in shapes.items()}
        try:
            with open(path, "r+b" if path.exists() else "w+b") as file:
                file.write(head)
                os.truncate(file.fileno(), len(head) + ends)
        except OSError as error:
            raise _unwritable(path, error) from error
        return cls(path, types, {name: len(head) + offset for name, offset in offsets.items()}, rows)

    @classmethod
    def copy(cls, path: Path, quantized: Path) -> Self:
        """A copy of a quantized GGUF, whose tensors may be written anew; raises SamqError if it cannot be written."""
        try:
            if not path.exists():  # else a killed process made it
                partial = path.with_name(f"{path.name}.copy")
                shutil.copyfile(quantized, partial)
                os.replace(partial, path)
        except OSError as error:
            raise _unwritable(path, error) from error
        tensors = read_header(quantized).tensors
        return cls(
            path,
            {name: entry.type for name, entry in tensors.items()},
            {name: entry.offset for name, entry in tensors.items()},
            {name: tensor_bytes(entry.type, entry.shape[-1:]) for name, entry in tensors.items()},
        )

    def write(self, name: str, first_row: int, blocks: NDArray[np.uint8]) -> None:
        """Write some rows of a tensor, counted through all experts: blocks (rows, bytes of a row)."""
        if blocks.shape[1] != self._row_bytes[name]:
            raise ValueError(f"a row of {name} has {self._row_bytes[name]} bytes, not {blocks.shape[1]}")
        try:
            with open(self.path, "r+b", buffering=0) as file:
                file.seek(self._offsets[name] + first_row * self._row_bytes[name])
                content, written = np.ascontiguousarray(blocks).reshape(-1), 0
                while written < len(content):  # a single call writes at most 2 GiB
                    written += file.write(content[written : written + 2**30].data)
        except OSError as error:
            raise _unwritable(self.path, error) from error


def _order(name: str) -> tuple[int, bytes]:
    """The order in which llama.cpp has tensors (weight_name_comparer in src/llama-model-loader.h)."""
    block = _BLOCK.match(name)
    return int(block[1]) if block else -1, name.encode()


def _values(
    values: Mapping[str, bytes], plan: Plan, metadata: Mapping[str, str], imatrix: Path | None
) -> dict[str, bytes]:
    """The metadata in llama-quantize's order: what it sets comes after what it keeps of the full-precision GGUF."""
    kind = LlamaFileType[f"ALL_{plan.mixture}" if plan.mixture == "F32" else f"MOSTLY_{plan.mixture}"]
    own = {
        "general.quantization_version": _number(GGML_QUANT_VERSION),
        "general.file_type": _number(kind),
        **{key: _text(value) for key, value in metadata.items()},
    }
    if imatrix:
        description = read_description(imatrix)
        own["quantize.imatrix.file"] = _text(imatrix.name)
        if description.dataset is not None:
            own["quantize.imatrix.dataset"] = _text(description.dataset)
        own["quantize.imatrix.entries_count"] = _number(description.entries)
        if description.chunks > 0:
            own["quantize.imatrix.chunks_count"] = _number(description.chunks)
    return {key: value for key, value in values.items() if key not in own and key not in _OF_PARTS} | own


def _number(value: int) -> bytes:
    return struct.pack("<II", GGUFValueType.UINT32, value)


def _text(value: str) -> bytes:
    content = value.encode()[:_LONGEST_VALUE]
    return struct.pack("<IQ", GGUFValueType.STRING, len(content)) + content


def _unwritable(path: Path, error: OSError) -> SamqError:
    return SamqError(f"cannot write {path}: {error.strerror}; choose a folder that can be written to")
