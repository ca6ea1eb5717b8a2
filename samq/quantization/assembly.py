"""Assembly: a plan's GGUF put together from the ladder's rungs by copying tensor bytes, without quantizing again.

The file is the one that llama-quantize would write for the same plan, byte for byte: the metadata of a rung (that
llama-quantize wrote, with the same importance matrix) with the plan's own provenance and file type in their places,
and each tensor's bytes from the rung that has it in the plan's type; tensors of compensated rounding come from what
`samq.quantization.compensation.compensate_rung` made of their rung. Offsets are recomputed as gguf_set_tensor_type of
llama.cpp's ggml/src/gguf.cpp does.
"""

import errno
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFValueType, LlamaFileType
from gguf.constants import GGUF_DEFAULT_ALIGNMENT

from samq.allocation.ladder import Ladder
from samq.errors import SamqError
from samq.files import GGUF_NAME
from samq.gguf.audit import accept, provenance_metadata, require_space
from samq.gguf.file import require_alignment
from samq.gguf.formats import NEEDS_IMATRIX, tensor_bytes
from samq.progress import Progress, silent
from samq.records import Plan, QuantizedModel

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # GGUF value type -> bytes
_COPY_BYTES = 2**30  # of one system call
_NO_COPY_RANGE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]  # row length last
    type: str
    offset: int  # in the file


@dataclass(frozen=True)
class _Header:
    """A GGUF's header with its values as they lie in the file, so that they can be written again unchanged."""

    version: int
    values: dict[str, bytes]  # key -> type and value
    tensors: dict[str, _Tensor]


def assemble(
    ladder: Ladder,
    plan: Plan,
    folder: Path,
    *,
    provenance: dict[str, str],
    progress: Progress = silent,
) -> QuantizedModel:
    """Write the plan's GGUF into `folder` from the ladder, audit it, and describe it, as `samq.llamacpp.programs.quantize` does.

    Raises SamqError when the ladder lacks a tensor in the plan's type or the disk is too full, ToolError when what was
    written is not the plan.
    """
    require_space(folder, plan, plan.tensor_bytes)
    metadata, partial = provenance_metadata(plan, provenance), folder / f"{GGUF_NAME}.partial"
    write_assembled(ladder, plan, partial, metadata, progress)
    return accept(partial, plan, metadata)


def write_assembled(
    ladder: Ladder, plan: Plan, path: Path, metadata: Mapping[str, str], progress: Progress = silent
) -> None:
    """Write the plan's GGUF to `path`, with `metadata` in place of the rungs' own `samq.*` values; nothing is checked."""
    if not ladder.rungs:
        raise SamqError("the ladder has no rung to take the metadata from; make one first")
    require_alignment(ladder.gguf)
    # the first that has a tensor in the type wanted is where it is copied from
    compensated = ladder.compensated if plan.rounding == "compensated" else ()
    base = next(iter(ladder.rungs.values()))
    first = _read_header(base)
    paths = (*compensated, *ladder.rungs.values(), ladder.gguf)
    headers = {path: first if path == base else _read_header(path, first.values) for path in paths}
    pieces = []  # (file, offset in it, bytes), in the order of writing
    infos = bytearray()
    offset = 0
    for name, tensor in first.tensors.items():
        wanted = plan.types.get(name, headers[ladder.gguf].tensors[name].type)
        holders = {file: header.tensors[name].type for file, header in headers.items() if name in header.tensors}
        holder = next((file for file, kind in holders.items() if kind == wanted), None)
        if holder is None:
            held = sorted({*holders.values()})
            advice = "add that rung"
            if wanted in NEEDS_IMATRIX:
                advice = "add that rung, with an importance matrix that has an entry for this tensor"
            raise SamqError(f"the ladder has {name} in {', '.join(held)} and plan {plan.name} wants {wanted}; {advice}")
        size = tensor_bytes(wanted, tensor.shape)
        infos += _string(name) + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        infos += struct.pack("<IQ", GGMLQuantizationType[wanted], offset)
        pieces.append((holder, headers[holder].tensors[name].offset, size))
        offset += _padded(size)
    values = _values(first.values, plan, metadata)
    head = b"GGUF" + struct.pack("<IQQ", first.version, len(first.tensors), len(values))
    head += b"".join(_string(key) + value for key, value in values.items()) + infos
    head += bytes(_padded(len(head)) - len(head))
    with open(path, "wb", buffering=0) as output:
        output.write(head)
        done = 0
        for file, start, size in _joined(pieces):
            progress(done, offset)
            with open(file, "rb", buffering=0) as source:
                _copy(source.fileno(), start, output.fileno(), size)
            padding = _padded(size) - size
            output.write(bytes(padding))
            done += size + padding


def _values(values: Mapping[str, bytes], plan: Plan, metadata: Mapping[str, str]) -> dict[str, bytes]:
    """A rung's values with the plan's file type, and `metadata` where the rung has its own `samq.*`."""
    own = {key: struct.pack("<I", GGUFValueType.STRING) + _string(value) for key, value in metadata.items()}
    result: dict[str, bytes] = {}
    for key, value in values.items():
        if key == "general.file_type":
            kind = LlamaFileType[f"ALL_{plan.mixture}" if plan.mixture == "F32" else f"MOSTLY_{plan.mixture}"]
            result[key] = struct.pack("<II", GGUFValueType.UINT32, kind)
        elif not key.startswith("samq."):
            result[key] = value
        else:
            result |= own
    return result


def _joined(pieces: list[tuple[Path, int, int]]) -> Iterator[tuple[Path, int, int]]:
    """Join pieces that lie one behind the other in one file, the padding between them included."""
    run: tuple[Path, int, int] | None = None
    for file, start, size in pieces:
        if run and run[0] == file and run[1] + _padded(run[2]) == start:
            run = (file, run[1], start + size - run[1])
        else:
            if run:
                yield run
            run = (file, start, size)
    if run:
        yield run


def _copy(source: int, start: int, output: int, size: int) -> None:
    """Append `size` bytes of the file `source` from `start` to the file `output`, inside the kernel where it can."""
    end = start + size
    ranged = hasattr(os, "copy_file_range")
    while start < end:
        count = min(_COPY_BYTES, end - start)
        try:
            copied = (
                os.copy_file_range(source, output, count, start)
                if ranged
                else os.sendfile(output, source, start, count)
            )
        except OSError as error:
            if not ranged or error.errno not in _NO_COPY_RANGE:
                raise
            ranged = False  # another file system, or one that cannot
            continue
        if copied == 0:
            raise SamqError("a rung of the ladder is shorter than its header says; make the ladder again")
        start += copied


def _read_header(path: Path, likely: Mapping[str, bytes] | None = None) -> _Header:
    """The header of a GGUF (version 3, as llama-quantize writes it); raises SamqError if it is damaged.

    `likely` values, another rung's, are recognized as a whole: a vocabulary's strings are read one by one only once.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse(data, likely or {})
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise SamqError(f"{path} is not a whole GGUF file ({error}); make the ladder again") from error


def _parse(data: mmap.mmap, likely: Mapping[str, bytes]) -> _Header:
    if data[:4] != b"GGUF":
        raise ValueError("no GGUF magic")
    version, tensor_count, value_count = struct.unpack_from("<IQQ", data, 4)
    at = 24
    values = {}
    for _ in range(value_count):
        key, at = _read_string(data, at)
        value = likely.get(key, b"")
        if not value or data[at : at + len(value)] != value:  # values say themselves where they end
            value = data[at : _skip_value(data, at)]
        values[key] = value
        at += len(value)
    found = []
    for _ in range(tensor_count):
        name, at = _read_string(data, at)
        (dimensions,) = struct.unpack_from("<I", data, at)
        shape = struct.unpack_from(f"<{dimensions}Q", data, at + 4)
        kind, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * dimensions)
        at += 16 + 8 * dimensions
        found.append((name, tuple(reversed(shape)), GGMLQuantizationType(kind).name, offset))
    start = _padded(at)
    return _Header(version, values, {name: _Tensor(shape, kind, start + offset) for name, shape, kind, offset in found})


def _skip_value(data: mmap.mmap, at: int) -> int:
    """Where the value (its type first) that starts at `at` ends."""
    kind, at = struct.unpack_from("<I", data, at)[0], at + 4
    count = 1
    if kind == GGUFValueType.ARRAY:
        kind, count = struct.unpack_from("<IQ", data, at)
        at += 12
    if kind != GGUFValueType.STRING:
        return at + count * _SCALARS[kind]
    length_at = struct.Struct("<Q").unpack_from
    for _ in range(count):
        at += 8 + length_at(data, at)[0]
    return at


def _read_string(data: mmap.mmap, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + length].decode(), at + 8 + length


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _padded(size: int) -> int:
    return -(-size // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT
