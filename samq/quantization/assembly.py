"""Assembly: a plan's GGUF is put together from the ladder's rungs by copying tensor bytes, without quantizing again.

The file has the bytes that llama-quantize would write for the same plan. The metadata come from a rung, which
llama-quantize wrote with the same importance matrix; the plan's own provenance and file type replace the rung's. Each
tensor's bytes come from the rung that has it in the plan's type, or, for a plan of compensated rounding, from the file
that `samq.quantization.compensation.compensate_rung` made of that rung. Offsets are computed as in
gguf_set_tensor_type of llama.cpp's ggml/src/gguf.cpp.
"""

import errno
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFValueType, LlamaFileType

from samq.allocation.ladder import Ladder
from samq.errors import SamqError
from samq.files import GGUF_NAME
from samq.gguf.audit import accept, provenance_metadata, require_space
from samq.gguf.file import require_alignment
from samq.gguf.formats import NEEDS_IMATRIX, tensor_bytes
from samq.gguf.header import Header, pack_string, padded, read_header
from samq.progress import Progress, silent
from samq.records import Plan, QuantizedModel

_COPY_BYTES = 2**30  # at most in one system call
_NO_COPY_RANGE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class _Piece:
    """Bytes of a file that are copied as they are."""

    file: Path
    offset: int
    bytes: int

    @property
    def end(self) -> int:
        """Where the next tensor starts in the file, after the padding."""
        return self.offset + padded(self.bytes)


def assemble(
    ladder: Ladder,
    plan: Plan,
    folder: Path,
    *,
    provenance: dict[str, str],
    progress: Progress = silent,
) -> QuantizedModel:
    """Write the plan's GGUF into `folder` from the ladder, audit it and describe it.

    The file and the record are those of `samq.llamacpp.programs.quantize`. Raises SamqError if the ladder lacks a tensor
    in the plan's type or the disk is too full, and ToolError if the written file is not the plan's.
    """
    require_space(folder, plan, plan.tensor_bytes)
    metadata, partial = provenance_metadata(plan, provenance), folder / f"{GGUF_NAME}.partial"
    write_assembled(ladder, plan, partial, metadata, progress)
    return accept(partial, plan, metadata, ladder.gguf)


def write_assembled(
    ladder: Ladder, plan: Plan, path: Path, metadata: Mapping[str, str], progress: Progress = silent
) -> None:
    """Write the plan's GGUF to `path` without auditing it; `metadata` replace the `samq.*` values of the rung.

    Raises SamqError as `assemble` does.
    """
    if not ladder.rungs:
        raise SamqError("the ladder does not have a rung to take the metadata from; make one first")
    require_alignment(ladder.gguf)
    compensated = ladder.compensated if plan.rounding == "compensated" else ()
    base = next(iter(ladder.rungs.values()))
    base_header = read_header(base)
    files = (*compensated, *ladder.rungs.values(), ladder.gguf)  # of several that have a tensor the first is taken
    headers = {file: base_header if file == base else read_header(file, base_header.values) for file in files}
    types = {name: plan.types.get(name, entry.type) for name, entry in headers[ladder.gguf].tensors.items()}
    pieces = []
    infos = bytearray()
    offset = 0
    for name, entry in base_header.tensors.items():
        piece = _find_piece(name, types[name], headers, plan)
        infos += pack_string(name) + struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *reversed(entry.shape))
        infos += struct.pack("<IQ", GGMLQuantizationType[types[name]], offset)
        pieces.append(piece)
        offset += padded(piece.bytes)
    values = _values(base_header.values, plan, metadata)
    head = b"GGUF" + struct.pack("<IQQ", base_header.version, len(base_header.tensors), len(values))
    head += b"".join(pack_string(key) + value for key, value in values.items()) + infos
    head += bytes(padded(len(head)) - len(head))
    _write(path, head, pieces, progress)


def _find_piece(name: str, kind: str, headers: Mapping[Path, Header], plan: Plan) -> _Piece:
    """The tensor in the first file that has it in this type; raises SamqError if none does."""
    entries = {file: header.tensors[name] for file, header in headers.items() if name in header.tensors}
    for file, entry in entries.items():
        if entry.type == kind:
            return _Piece(file, entry.offset, tensor_bytes(kind, entry.shape))
    types = sorted({entry.type for entry in entries.values()})
    advice = "add that rung"
    if kind in NEEDS_IMATRIX:
        advice = "add that rung, with an importance matrix that has an entry for this tensor"
    raise SamqError(f"the ladder has {name} in {', '.join(types)} and plan {plan.name} wants {kind}; {advice}")


def _values(values: Mapping[str, bytes], plan: Plan, metadata: Mapping[str, str]) -> dict[str, bytes]:
    """A rung's values with the plan's file type, and `metadata` where the rung has its own `samq.*`."""
    own = {key: struct.pack("<I", GGUFValueType.STRING) + pack_string(value) for key, value in metadata.items()}
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


def _write(path: Path, head: bytes, pieces: list[_Piece], progress: Progress) -> None:
    """Write the header and then the pieces, each padded to the alignment."""
    total = sum(padded(piece.bytes) for piece in pieces)
    with open(path, "wb", buffering=0) as output:
        output.write(head)
        written = 0
        for piece in _joined(pieces):
            progress(written, total)
            with open(piece.file, "rb", buffering=0) as source:
                _copy(source.fileno(), piece.offset, output.fileno(), piece.bytes)
            output.write(bytes(padded(piece.bytes) - piece.bytes))
            written += padded(piece.bytes)


def _joined(pieces: list[_Piece]) -> Iterator[_Piece]:
    """Join pieces that follow one another in one file, with the padding between them."""
    run: _Piece | None = None
    for piece in pieces:
        if run and run.file == piece.file and run.end == piece.offset:
            run = _Piece(run.file, run.offset, piece.offset + piece.bytes - run.offset)
        else:
            if run:
                yield run
            run = piece
    if run:
        yield run


def _copy(source: int, start: int, output: int, size: int) -> None:
    """Append `size` bytes from `start` of the file `source` to the file `output`, inside the kernel where possible."""
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
            ranged = False  # the files lie on two file systems, or on one that does not support the call
            continue
        if copied == 0:
            raise SamqError("a rung of the ladder is shorter than its header says; make the ladder again")
        start += copied
