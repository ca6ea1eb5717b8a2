"""The codes of a quantized tensor: read from its blocks, and written back without a change to the scales.

A weight is `scale * level + offset`. Its block gives the scale and the offset. The level is one of the few numbers of the
type, and the weight's code is the index of that level. A block stores the codes of its weights as bit fields.
Layouts: ggml/src/ggml-common.h of llama.cpp, and `gguf.quants`, which orders a field's bits the same way. Types whose
codes stand for several weights at once (IQ3_S, IQ2_XS and the like) do not have such a grid.
"""

from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import IQ4_NL
from numpy.typing import NDArray

from samq.gguf.ggml import to_float


@dataclass(frozen=True)
class _Field:
    """Some bits of every code of a block: `size` bytes from `offset`, in runs of `width` bytes.

    A weight has `bits` bits in the field, and they are the bits from `shift` on in its code. The lowest bits of a run's
    bytes belong to the run's first `width` weights, the next bits to the next `width`.
    """

    offset: int
    size: int
    width: int
    bits: int
    shift: int = 0


@dataclass(frozen=True)
class _BlockLayout:
    """Where the codes of a type are in its blocks, and which levels they stand for."""

    weights: int
    bytes: int
    fields: tuple[_Field, ...]
    levels: tuple[int, ...]
    signed: bool = False  # stored as int8, so that code 128 is the level 0
    first: int = 0  # the lowest code that llama-quantize writes


def _uniform(bits: int) -> tuple[int, ...]:
    return tuple(range(2**bits))


_LAYOUTS = {
    "Q2_K": _BlockLayout(256, 84, (_Field(16, 64, 32, 2),), _uniform(2)),
    "Q3_K": _BlockLayout(256, 110, (_Field(32, 64, 32, 2), _Field(0, 32, 32, 1, shift=2)), _uniform(3)),
    "Q4_K": _BlockLayout(256, 144, (_Field(16, 128, 32, 4),), _uniform(4)),
    "Q5_K": _BlockLayout(256, 176, (_Field(48, 128, 32, 4), _Field(16, 32, 32, 1, shift=4)), _uniform(5)),
    "Q6_K": _BlockLayout(256, 210, (_Field(0, 128, 64, 4), _Field(128, 64, 32, 2, shift=4)), _uniform(6)),
    "IQ4_XS": _BlockLayout(256, 136, (_Field(8, 128, 16, 4),), IQ4_NL.kvalues),
    "IQ4_NL": _BlockLayout(32, 18, (_Field(2, 16, 16, 4),), IQ4_NL.kvalues),
    "Q4_0": _BlockLayout(32, 18, (_Field(2, 16, 16, 4),), _uniform(4)),
    "Q4_1": _BlockLayout(32, 20, (_Field(4, 16, 16, 4),), _uniform(4)),
    "Q5_0": _BlockLayout(32, 22, (_Field(6, 16, 16, 4), _Field(2, 4, 1, 1, shift=4)), _uniform(5)),
    "Q5_1": _BlockLayout(32, 24, (_Field(8, 16, 16, 4), _Field(4, 4, 1, 1, shift=4)), _uniform(5)),
    # llama-quantize never writes -128, and some of ggml's kernels negate a value, which int8 cannot do to it.
    "Q8_0": _BlockLayout(32, 34, (_Field(2, 32, 1, 8),), _uniform(8), signed=True, first=1),
}
TYPES_WITH_CODES = frozenset(_LAYOUTS)


GROUP = 16  # weights in a row, from the row's start on, that have the same scale and offset in every type


@dataclass(frozen=True)
class CodeGrid:
    """The values that each weight of some rows can have: `scale * level + offset`, for the codes from `first` on."""

    scale: NDArray[np.float32]  # (rows, row length / GROUP)
    offset: NDArray[np.float32]  # (rows, row length / GROUP)
    levels: NDArray[np.float32]  # in rising order; of codes first, first + 1, ...
    first: int


def read_codes(kind: str, blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Read the codes, uint8 (rows, row length), from the blocks (rows, bytes of a row) of a type."""
    layout = _LAYOUTS[kind]
    flat = blocks.reshape(-1, layout.bytes)
    codes = np.zeros((len(flat), layout.weights), np.uint8)
    for field in layout.fields:
        runs = flat[:, field.offset : field.offset + field.size].reshape(len(flat), -1, 1, field.width)
        bits = (runs >> _shifts(field)) & np.uint8(2**field.bits - 1)
        codes |= bits.reshape(len(flat), -1) << np.uint8(field.shift)
    return (codes ^ _sign(layout)).reshape(len(blocks), -1)


def write_codes(kind: str, blocks: NDArray[np.uint8], codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the blocks (rows, bytes of a row) with these codes (rows, row length) and their own scales."""
    layout = _LAYOUTS[kind]
    flat = blocks.reshape(-1, layout.bytes).copy()
    stored = codes.reshape(len(flat), layout.weights) ^ _sign(layout)
    for field in layout.fields:
        bits = (stored >> np.uint8(field.shift)) & np.uint8(2**field.bits - 1)
        runs = bits.reshape(len(flat), -1, 8 // field.bits, field.width) << _shifts(field)
        flat[:, field.offset : field.offset + field.size] = np.bitwise_or.reduce(runs, axis=2).reshape(len(flat), -1)
    return flat.reshape(blocks.shape)


def read_grid(kind: str, blocks: NDArray[np.uint8]) -> CodeGrid:
    """Read the grid of each group of weights from the scales in the blocks (rows, bytes of a row) of a type."""
    layout = _LAYOUTS[kind]
    row_length = blocks.shape[1] // layout.bytes * layout.weights

    def value_of(code: int) -> NDArray[np.float32]:
        codes = np.full((len(blocks), row_length), code, np.uint8)
        values = to_float(GGMLQuantizationType[kind], write_codes(kind, blocks, codes), row_length)
        return values[:, ::GROUP].copy()

    levels = np.array(layout.levels, np.float32)
    low, scale = value_of(0), value_of(len(levels) - 1)  # dequantization is linear in the level, so two values suffice
    scale -= low
    scale /= levels[-1] - levels[0]
    low -= scale * levels[0]
    return CodeGrid(scale, low, levels[layout.first :], layout.first)


def _shifts(field: _Field) -> NDArray[np.uint8]:
    return np.arange(0, 8, field.bits, dtype=np.uint8).reshape(1, 1, -1, 1)


def _sign(layout: _BlockLayout) -> np.uint8:
    return np.uint8(0x80 if layout.signed else 0)
