"""ggml's own functions on rows of weights: from a quantized type to float32 and back.

They are the ones that llama.cpp's programs call. numpy would take minutes where these take seconds.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

_PART_WEIGHTS = 2**17  # that a thread quantizes at a time; the bytes do not depend on it


def to_float(kind: GGMLQuantizationType, blocks: NDArray[np.uint8], row_length: int) -> NDArray[np.float32]:
    """Dequantize blocks (rows, bytes of a row) of a type: float32, (rows, row length)."""
    blocks = np.ascontiguousarray(blocks)
    values = np.empty((len(blocks), row_length), np.float32)
    _dequantization(kind)(blocks.ctypes.data, values.ctypes.data, values.size)
    return values


def quantize_rows(
    kind: GGMLQuantizationType, weights: NDArray[np.float32], importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """Quantize rows to a type, each weight to the value that llama-quantize gives it: blocks, (rows, bytes of a row).

    Args:
        kind: any type that llama-quantize writes.
        weights: (rows, row length), finite; the row length is a whole number of the type's blocks.
        importance: of each column, (row length,); None: all alike. IQ1_S, IQ2_XXS and IQ2_XS cannot do without.
    """
    rows, row_length = weights.shape
    weights = np.ascontiguousarray(weights, np.float32)
    columns = None if importance is None else np.ascontiguousarray(importance, np.float32)
    if columns is not None and columns.shape != (row_length,):
        raise ValueError(f"the importance of {row_length} columns has the shape {columns.shape}")
    if columns is None and _library().ggml_quantize_requires_imatrix(int(kind)):  # ggml would end the process
        raise ValueError(f"{kind.name} cannot be quantized without the columns' importance")
    blocks = empty_blocks(kind, rows, row_length)
    pointer = None if columns is None else columns.ctypes.data
    step = max(1, _PART_WEIGHTS // row_length)

    def part(first: int) -> None:
        source, target = weights[first:].ctypes.data, blocks[first:].ctypes.data
        _library().ggml_quantize_chunk(int(kind), source, target, 0, min(step, rows - first), row_length, pointer)

    if rows <= step:
        part(0)
    else:
        list(_threads().map(part, range(0, rows, step)))
    return blocks


def empty_blocks(kind: GGMLQuantizationType, rows: int, row_length: int) -> NDArray[np.uint8]:
    """Memory for the blocks of some rows, (rows, bytes of a row)."""
    block_weights, block_bytes = GGML_QUANT_SIZES[kind]
    if row_length % block_weights:
        raise ValueError(f"rows of {row_length} weights are no whole number of {kind.name}'s blocks of {block_weights}")
    return np.empty((rows, row_length // block_weights * block_bytes), np.uint8)


class _TypeTraits(ctypes.Structure):
    """The head of `struct ggml_type_traits` in llama.cpp's ggml/include/ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@lru_cache
def _library() -> ctypes.CDLL:
    import llama_cpp  # slow to import, and most callers of samq.gguf never need it

    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = (ctypes.c_int, pointer, pointer, count, count, count, pointer)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    return library


@lru_cache
def _dequantization(kind: GGMLQuantizationType) -> Callable[[int, int, int], None]:
    """ggml's dequantization of a type: (blocks, float32 values, number of values)."""
    function: Callable[[int, int, int], None] = _library().ggml_get_type_traits(int(kind)).contents.to_float
    return function


@lru_cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="quantize")
