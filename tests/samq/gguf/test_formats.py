import pytest

from samq.errors import SamqError
from samq.gguf.formats import (
    TYPES,
    bits_per_weight,
    check_mixture,
    check_type,
    fallback,
    fits,
    tensor_bytes,
    without_entry,
)


def test_types_run_from_fewest_bits_to_most():
    bits = [bits_per_weight(name) for name in TYPES]
    assert bits == sorted(bits)
    assert bits_per_weight("Q4_K") == 4.5
    assert bits_per_weight("Q8_0") == 8.5
    assert TYPES[-1] == "F32"


def test_tensor_bytes_counts_blocks():
    assert tensor_bytes("Q8_0", (2, 64)) == 2 * 2 * 34
    assert tensor_bytes("F32", (7,)) == 28


@pytest.mark.parametrize(
    ("requested", "row_length", "used"),
    [
        ("Q4_K", 256, "Q4_K"),
        ("Q4_K", 576, "Q5_0"),
        ("Q6_K", 576, "Q8_0"),
        ("IQ4_XS", 96, "IQ4_NL"),
        ("Q4_K", 100, "F16"),
    ],
)
def test_fallback_is_what_the_row_length_allows(requested, row_length, used):
    assert fallback(requested, row_length) == used
    assert fits(used, row_length)


@pytest.mark.parametrize(
    ("requested", "tensor", "used"),
    [
        ("IQ2_XS", "token_embd.weight", "Q2_K"),
        ("IQ2_S", "token_embd.weight", "IQ2_S"),
        ("IQ2_S", "blk.0.attn_q.weight", "Q2_K"),
        ("IQ3_XXS", "blk.0.attn_q.weight", "Q3_K"),
        ("IQ3_S", "blk.0.attn_q.weight", "IQ3_S"),
    ],
)
def test_a_tensor_without_an_entry_takes_the_nearest_type_that_needs_none(requested, tensor, used):
    assert without_entry(requested, tensor) == used


def test_unknown_names_are_one_sentence():
    assert check_type("q4_k") == "Q4_K"
    assert check_mixture("q4_k_m") == "Q4_K_M"
    with pytest.raises(SamqError, match="unknown ggml type 'Q4_K_M'; choose one of"):
        check_type("Q4_K_M")
    with pytest.raises(SamqError, match="unknown llama-quantize mixture 'Q9'"):
        check_mixture("Q9")
