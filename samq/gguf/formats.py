"""The ggml types: block size, bytes, and which type llama-quantize writes where a row or a missing entry rules one out."""

import math

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from samq.errors import SamqError

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"

# llama-quantize's own replacements where the row length is not a multiple of the block
# (tensor_type_fallback in llama.cpp's src/llama-quant.cpp). Where the replacement does not fit either, it writes F16.
_FALLBACK = {
    **dict.fromkeys(
        ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"),
        "IQ4_NL",
    ),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}

UNMEASURED = "Q8_0"  # the default type of a tensor whose sensitivity is not known: safe, and half of F16

# llama-quantize writes these only to a tensor that has an entry in the importance matrix (tensor_requires_imatrix in
# llama.cpp's src/llama-quant.cpp). Beside each is the type nearest in bits that does not need one.
NEEDS_IMATRIX = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"), "Q2_K"),
    "IQ3_XXS": "Q3_K",
}
# llama-quantize does not check these two tensors, and then ggml aborts at the types that it cannot quantize without
# an entry (ggml_quantize_requires_imatrix).
_UNCHECKED = frozenset({EMBEDDING, OUTPUT})
_ABORTS = frozenset({"IQ1_S", "IQ2_XXS", "IQ2_XS"})


def _block(name: str) -> tuple[int, int]:
    """Weights and bytes of one block."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[name]]


def bits_per_weight(name: str) -> float:
    """Bits per weight of a type, including its scales."""
    weights, size = _block(name)
    return 8 * size / weights


def smaller(one: str, other: str) -> str:
    """The type with fewer bits; `one` if they have as many."""
    return min(one, other, key=bits_per_weight)


# The types that a plan may name: those that llama-quantize writes, from fewest bits to most.
TYPES = tuple(sorted([*_FALLBACK, *"Q4_0 Q4_1 Q5_0 Q5_1 IQ4_NL Q8_0 F16 BF16 F32".split()], key=bits_per_weight))

# The file types of llama-quantize, mixtures and plain ones, that a stock candidate may name.
MIXTURES = tuple(
    "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M Q2_K_S Q2_K IQ3_XXS IQ3_XS IQ3_S IQ3_M Q3_K_S Q3_K_M Q3_K_L IQ4_XS IQ4_NL "
    "Q4_0 Q4_1 Q4_K_S Q4_K_M Q5_0 Q5_1 Q5_K_S Q5_K_M Q6_K Q8_0 F16 BF16".split()
)


# The types that a full-precision GGUF may have: floats, and MXFP4, in which gpt-oss is published.
FULL_PRECISION = frozenset({"F16", "BF16", "F32", "MXFP4"})


def check_type(name: str) -> str:
    """Return the type's canonical name; raises SamqError for a type that llama-quantize cannot write."""
    if name.upper() not in TYPES:
        raise SamqError(f"unknown ggml type {name!r}; choose one of {', '.join(TYPES)}")
    return name.upper()


def check_mixture(name: str) -> str:
    """Return the mixture's canonical name; raises SamqError for a mixture that llama-quantize does not have."""
    if name.upper() not in MIXTURES:
        raise SamqError(f"unknown llama-quantize mixture {name!r}; choose one of {', '.join(MIXTURES)}")
    return name.upper()


def fits(name: str, row_length: int) -> bool:
    """Whether a row of this length is a whole number of the type's blocks."""
    return row_length % _block(name)[0] == 0


def fallback(name: str, row_length: int) -> str:
    """The type that llama-quantize writes for `name` on rows of this length."""
    if fits(name, row_length):
        return name
    smaller = _FALLBACK.get(name, name)
    return smaller if fits(smaller, row_length) else "F16"


def without_entry(name: str, tensor: str) -> str:
    """The type nearest to `name` that llama-quantize writes to a tensor without an entry in the importance matrix."""
    needed = _ABORTS if tensor in _UNCHECKED else NEEDS_IMATRIX
    return NEEDS_IMATRIX[name] if name in needed else name


def tensor_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this shape (torch order: row length last) in this type."""
    weights, size = _block(name)
    return math.prod(shape) // weights * size
