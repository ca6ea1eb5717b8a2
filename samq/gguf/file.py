"""A GGUF file: its tensors, types, bytes and metadata, and the map from Hugging Face's tensor names to GGUF's."""

import hashlib
import math
import os
import re
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import ReaderTensor, dequantize, get_tensor_name_map
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, MODEL_ARCH_NAMES
from numpy.typing import NDArray

from samq.errors import SamqError
from samq.gguf.ggml import to_float
from samq.gguf.header import LazyReader, UnknownTypeError
from samq.gguf.split import Part

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "folder"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISSOCK, "socket"),
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF; `shape` is in torch's order, row length last."""

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int

    @property
    def row_length(self) -> int:
        """Number of weights in a row. Quantization blocks lie along a row."""
        return self.shape[-1]

    @property
    def extents(self) -> tuple[int, ...]:
        """The shape without leading ones, which llama.cpp leaves out when it writes a tensor again."""
        return without_ones(self.shape)

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape in torch's order without leading ones; its last extent always stays."""
    return without_ones(shape[1:]) if len(shape) > 1 and shape[0] == 1 else shape


def open_gguf(path: Path, *, is_part: bool = False) -> LazyReader:
    """Open a GGUF by memory map.

    Raises SamqError if it is missing, not a GGUF, cut short, or one part of several where `is_part` does not allow that.
    """
    path = Path(path)
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = "" if isinstance(error, FileNotFoundError | NotADirectoryError) else f" ({_reason(error)})"
        raise SamqError(f"there is no GGUF file at {path}{reason}; check the path") from error
    require_regular(path, status)
    reader = _open(path, status.st_size, status.st_mtime_ns)
    if not is_part and (part := Part.of(path, reader.fields)):
        raise part.refused()
    return reader


def gguf_files(path: Path) -> list[Path]:
    """The files of a GGUF: all parts if it is the first of several (llama-gguf-split), else itself.

    Raises SamqError if it is another part than the first, if a part is missing, or as `open_gguf` does.
    """
    part = Part.of(path, open_gguf(path, is_part=True).fields)
    return part.all_files() if part else [path]


@lru_cache(maxsize=4)  # `read_tensors` and `read_metadata` follow one another; a changed file is another entry
def _open(path: Path, size: int, mtime_ns: int) -> LazyReader:
    try:
        return LazyReader(path)
    except UnknownTypeError as error:
        raise SamqError(f"cannot read {path}: {error}; use a GGUF of ggml's types") from error
    except Exception as error:  # gguf raises errors of any kind on damaged bytes
        raise SamqError(f"{path} is not a whole GGUF file ({error}); copy or convert it again") from error


def read_tensors(path: Path, *, is_part: bool = False) -> dict[str, TensorInfo]:
    """Name -> tensor, in the file's order. Arguments and errors are those of `open_gguf`."""
    return {
        tensor.name: TensorInfo(
            tensor.name,
            tuple(int(extent) for extent in reversed(tensor.shape)),
            tensor.tensor_type.name,
            int(tensor.n_bytes),
        )
        for tensor in open_gguf(path, is_part=is_part).tensors
    }


def read_metadata(path: Path, *, is_part: bool = False) -> dict[str, Any]:
    """Key -> Python value of the file's metadata, without arrays such as the vocabulary.

    Bytes that are not UTF-8 become U+FFFD. Arguments and errors are those of `open_gguf`.
    """
    fields = open_gguf(path, is_part=is_part).fields
    return {
        key: field.contents()
        for key, field in fields.items()
        if not key.startswith("GGUF.") and field.types and field.types[0].name != "ARRAY"
    }


def read_weights(path: Path, name: str) -> np.ndarray:
    """Dequantize one tensor to float32, in torch's shape; raises SamqError if the file lacks it."""
    for tensor in open_gguf(path).tensors:
        if tensor.name == name:
            return dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape)))
    raise SamqError(f"{path} has no tensor {name}; list them with `samq inspect {path}`")


Rows = slice | NDArray[np.intp]  # or their numbers, in rising order; those of stacked experts are counted through


def read_rows(tensor: ReaderTensor, rows: Rows) -> NDArray[np.float32]:
    """Dequantize some rows of a tensor with llama.cpp: float32, (rows, row length)."""
    return as_float(tensor, tensor.data.reshape(-1, tensor.data.shape[-1])[rows])


def as_float(tensor: ReaderTensor, rows: np.ndarray) -> NDArray[np.float32]:
    """Rows of a tensor, as its file has them, in float32: (rows, row length)."""
    if rows.dtype in (np.float16, np.float32):
        return rows.astype(np.float32)
    return to_float(tensor.tensor_type, rows, int(tensor.shape[0]))


def mostly_unknown(tensors: Mapping[str, TensorInfo], known: Collection[str]) -> str | None:
    """What to say if most weights of a GGUF's matrices are not in the `known` ones; None if they are."""
    matrices = {name: tensor.weights for name, tensor in tensors.items() if len(tensor.shape) > 1}
    share = sum(count for name, count in matrices.items() if name not in known) / max(1, sum(matrices.values()))
    return f"{100 * share:.0f} % of the GGUF's weights cannot be told from this model" if share > 0.5 else None


def gguf_names(metadata: dict[str, Any]) -> Callable[[str], str | None]:
    """Return a function from a Hugging Face parameter name to its GGUF name, or None if the architecture has none.

    `metadata` is a GGUF's (`read_metadata`). Of a multimodal model the function takes the names of the text part. Raises
    SamqError for an architecture that the gguf package does not know.
    """
    architecture = metadata["general.architecture"]
    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    if architecture not in kinds:
        raise SamqError(
            f"the gguf package does not know the tensor names of architecture {architecture!r}; update gguf"
        )
    names = get_tensor_name_map(kinds[architecture], metadata[f"{architecture}.block_count"])

    def gguf_name(hf_name: str) -> str | None:
        text_name = hf_name.replace("language_model.", "").replace("text_model.", "")  # as llama.cpp's converter does
        # Nemotron-H is published with the second name, and transformers 5 has the first
        own = (text_name, re.sub("^model", "backbone", text_name))
        return next((name for hf in own if (name := names.get_name(hf, try_suffixes=(".weight", ".bias")))), None)

    return gguf_name


def require_alignment(path: Path) -> None:
    """Raise SamqError for a GGUF that llama-quantize would damage.

    llama-quantize copies the key `general.alignment` and aligns tensors to 32 bytes whatever the key says.
    """
    alignment = read_metadata(path).get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if alignment != GGUF_DEFAULT_ALIGNMENT:
        raise SamqError(
            f"the tensors of {path} are aligned to {alignment} bytes and llama-quantize writes {GGUF_DEFAULT_ALIGNMENT} only; "
            "make the GGUF again with llama.cpp's converter"
        )


@dataclass(frozen=True)
class HashedFile:
    """A file and the SHA-256 (hex) of its content."""

    path: Path
    sha256: str

    @classmethod
    def of(cls, file: "Path | HashedFile") -> "HashedFile":
        """The file as it is, if its hash is known already; else it is read. Raises SamqError if it cannot be."""
        return file if isinstance(file, HashedFile) else cls(file, file_sha256(file))


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's content; raises SamqError if it cannot be read, or is no regular file."""
    try:
        require_regular(path, path.stat())
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise SamqError(f"cannot read {path}: {_reason(error)}; check the path") from error


def require_regular(path: Path, status: os.stat_result) -> None:
    """Raise SamqError for a folder, device, pipe or socket: reading one may never end. `status` is that of the path."""
    if stat.S_ISREG(status.st_mode):
        return
    kind = next((kind for is_kind, kind in _KINDS if is_kind(status.st_mode)), "special file")
    raise SamqError(f"{path} is a {kind}, not a regular file; name a file")


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
