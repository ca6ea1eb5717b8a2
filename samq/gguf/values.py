"""Whether the values of a quantized GGUF are those of its full-precision GGUF, as near as each type can be.

Types and sizes do not show a tensor of zeros, of another model, or with infinity in it. So some rows of every tensor are
dequantized and compared.
"""

import math
from pathlib import Path

import numpy as np
from gguf import ReaderTensor
from numpy.typing import NDArray

from samq.gguf.file import open_gguf, read_rows, read_tensors, without_ones
from samq.gguf.formats import FULL_PRECISION

_ROWS = 64  # compared of a tensor, spread evenly: seconds for 70 billion weights
_ROWS_OF_AN_EXPERT = 4  # at least
# Rows, or experts, with less than this share of the mean square do not count: F16 scales cannot hold weights under 1e-5.
_NEGLIGIBLE = 1e-4

# Type -> the largest squared error of a tensor, or of an expert, as a share of its weights' squares. Zeros have 1.
# Measured with ggml_quantize_chunk, with and without importance matrices, on three trained models of 46 to 135 million weights.
# Also on 12 distributions (Gauss to t with 2 degrees of freedom, sparse, outlier columns). Gaussian weights have Q8_0 3e-5,
# Q6_K 3e-4, Q5_K 1e-3, Q4_K 5e-3, Q3_K 0.02, Q2_K 0.07, IQ1_S 0.24 and TQ1_0 0.65. Trained tensors have at most 2.5 times that,
# and GPTQ multiplies it by up to 2.8. The limits are over all of these, by 10 to 100 times where 1 leaves room for that.
LIMITS = {
    **dict.fromkeys(("TQ1_0", "TQ2_0"), 0.95),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS"), 0.9),
    **dict.fromkeys(("IQ2_XS", "IQ2_S", "Q2_K"), 0.8),
    **dict.fromkeys(("IQ3_XXS", "IQ3_S"), 0.6),
    "Q3_K": 0.4,
    **dict.fromkeys(("Q4_0", "Q4_1", "Q4_K", "IQ4_NL", "IQ4_XS"), 0.3),
    **dict.fromkeys(("Q5_0", "Q5_1", "Q5_K"), 0.2),
    "Q6_K": 0.05,
    "Q8_0": 0.005,
    **dict.fromkeys(("F16", "BF16"), 0.001),
    "F32": 1e-6,
}

_WORDS = 2**22  # looked at together
# The bits of the exponent of each full-precision type
_EXPONENTS: dict[str, np.uint16 | np.uint32] = {
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
    "F32": np.uint32(0x7F800000),
}


def value_fault(full: Path, quantized: Path) -> str:
    """What is wrong with the values of the first tensor that cannot be the one in the full-precision GGUF; empty if none.

    Compares up to 64 rows of each tensor, and at least 4 of each stacked expert. Tensors that one of the files lacks are
    left out. Raises SamqError if a file cannot be read.
    """
    originals = {tensor.name: tensor for tensor in open_gguf(full).tensors}
    pairs = [(originals[tensor.name], tensor) for tensor in open_gguf(quantized).tensors if tensor.name in originals]
    faults = [(tensor.name, fault) for original, tensor in pairs if (fault := _fault(original, tensor))]
    if not faults:
        return ""
    more = f" ({len(faults)} tensors in all)" if len(faults) > 1 else ""
    return faults[0][1] + more


def first_not_finite(gguf: Path) -> tuple[str, bool] | None:
    """The first full-precision tensor with a value that is no number, and whether that is an infinity; None if all are.

    Raises SamqError if the file cannot be read.
    """
    for tensor in open_gguf(gguf).tensors:
        exponent = _EXPONENTS.get(tensor.tensor_type.name)
        if exponent is None:
            continue
        words = tensor.data.reshape(-1).view(exponent.dtype)
        for first in range(0, len(words), _WORDS):
            part = words[first : first + _WORDS]
            odd = part[(part & exponent) == exponent]  # all bits of the exponent: infinity, or NaN with a mantissa
            if len(odd):
                mantissa = (exponent & (~exponent + 1)) - 1  # the bits below the exponent
                return tensor.name, not (odd & mantissa).any()
    return None


def logits_not_finite(gguf: Path, where: str = "") -> str:
    """What to say of a file whose logits are not finite: no quantization mends a full-precision one."""
    types = {tensor.type for tensor in read_tensors(gguf, is_part=True).values()}
    advice = "get the model again, or choose another one" if types <= FULL_PRECISION else "quantize it again"
    return f"{gguf} gives logits that are not finite{where}; {advice}"


def _fault(original: ReaderTensor, tensor: ReaderTensor) -> str:
    """What is wrong with the tensor; empty if nothing is."""
    name, kind = f"{tensor.name} ({tensor.tensor_type.name})", tensor.tensor_type.name
    if _extents(tensor) != _extents(original):
        return f"{name} has another shape than in full precision"
    rows, experts = _sampled_rows(tensor)
    if tensor.tensor_type == original.tensor_type:
        if _bytes(tensor, rows) == _bytes(original, rows):
            return ""
        if kind not in LIMITS:
            return f"{name} differs from full precision, which has the same type"
    weights, values = (read_rows(part, rows).astype(np.float64) for part in (original, tensor))
    comparable = np.isfinite(weights).all(axis=1)
    if not np.isfinite(values[comparable]).all():
        row = int(rows[comparable][~np.isfinite(values[comparable]).all(axis=1)][0])
        return f"row {row} of {name} holds NaN or infinity, where full precision does not"
    weights[~comparable] = values[~comparable] = 0
    return _far_off(name, kind, weights, values, rows, experts)


def _far_off(
    name: str,
    kind: str,
    weights: NDArray[np.float64],
    values: NDArray[np.float64],
    rows: NDArray[np.intp],
    experts: int,
) -> str:
    squares = np.square(weights).sum(axis=1)
    errors = np.square(values - weights).sum(axis=1)
    zero = ~values.any(axis=1) & (squares > _NEGLIGIBLE * squares.mean())
    if zero.any():
        return f"row {int(rows[zero][0])} of {name} is all zeros, and not in full precision"
    squares, errors = (part.reshape(experts, -1).sum(axis=1) for part in (squares, errors))
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0: a tensor of zeros that stayed one
        relative = np.nan_to_num(errors / np.maximum(squares, _NEGLIGIBLE * squares.mean()), posinf=np.inf)
    worst, limit = int(relative.argmax()), LIMITS.get(kind, max(LIMITS.values()))
    if relative[worst] <= limit:
        return ""
    where = f"expert {worst} of {name}" if experts > 1 else name
    return f"{where} has a squared error of {relative[worst]:.2g} of its weights' squares, and {kind} stays below {limit:g}"


def _extents(tensor: ReaderTensor) -> tuple[int, ...]:
    return without_ones(tuple(int(extent) for extent in reversed(tensor.shape)))


def _sampled_rows(tensor: ReaderTensor) -> tuple[NDArray[np.intp], int]:
    """Numbers of the rows to compare, counted through all experts, and how many experts they are of."""
    _, *rest = (int(extent) for extent in tensor.shape)
    rows, experts = (rest[0] if rest else 1), math.prod(rest[1:])
    count = min(rows, max(_ROWS_OF_AN_EXPERT, _ROWS // experts))
    of_one = np.linspace(0, rows - 1, count).astype(np.intp)
    return (np.arange(experts, dtype=np.intp)[:, None] * rows + of_one).ravel(), experts


def _bytes(tensor: ReaderTensor, rows: NDArray[np.intp]) -> bytes:
    content: bytes = tensor.data.reshape(-1, tensor.data.shape[-1])[rows].tobytes()
    return content
