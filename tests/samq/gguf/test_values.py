"""A GGUF with the right types and sizes, and other values than the model's."""

import gguf
import numpy as np
import pytest

from samq.allocation.target import OpenTarget, stock_plan
from samq.errors import ToolError
from samq.gguf.audit import accept
from samq.gguf.file import open_gguf, read_weights
from samq.gguf.formats import TYPES
from samq.gguf.values import LIMITS, first_not_finite, logits_not_finite, value_fault
from samq.llamacpp.quantize import quantize
from tests.conftest import write_tiny_gguf

MATRIX, EXPERTS, NORM = "blk.0.ffn_up.weight", "blk.0.ffn_up_exps.weight", "blk.0.attn_norm.weight"


@pytest.fixture(scope="module")
def weights():
    random = np.random.default_rng(0)
    return {
        MATRIX: random.standard_t(4, (96, 256)).astype(np.float32),
        EXPERTS: random.normal(0, 0.02, (8, 40, 256)).astype(np.float32),
        NORM: random.random(256, np.float32),
    }


def write(path, weights, kind="F16"):
    writer = gguf.GGUFWriter(path, "llama")
    for name, tensor in weights.items():
        raw = gguf.GGMLQuantizationType["F32" if tensor.ndim == 1 else kind]
        with np.errstate(invalid="ignore"):  # of infinity
            writer.add_tensor(name, gguf.quantize(tensor, raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def full(weights, tmp_path):
    return write(tmp_path / "full.gguf", weights)


def changed(weights, name, value, *where):
    """The weights with a value, or a function of the tensor, at a place of one tensor."""
    tensor = weights[name].copy()
    tensor[where] = value(tensor) if callable(value) else value
    return weights | {name: tensor}


def test_a_leading_extent_of_one_is_no_other_shape(weights, tmp_path):
    """llama-quantize leaves it out; the routing bias of ERNIE 4.5 has one."""
    norm = weights[NORM]
    full = write(tmp_path / "full.gguf", weights | {NORM: norm[None]}, kind="F32")
    assert value_fault(full, write(tmp_path / "again.gguf", weights, kind="F32")) == ""
    other = write(tmp_path / "other.gguf", weights | {NORM: norm.reshape(2, 128)}, kind="F32")
    assert value_fault(full, other) == f"{NORM} (F32) has another shape than in full precision"


def test_every_type_that_a_plan_may_name_has_a_limit_under_that_of_zeros():
    assert LIMITS.keys() == set(TYPES)
    assert max(LIMITS.values()) < 1


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q5_1", "Q4_0"])
def test_a_quantization_of_the_model_has_no_fault(full, weights, tmp_path, kind):
    assert value_fault(full, write(tmp_path / "q.gguf", weights, kind)) == ""
    assert value_fault(full, full) == ""


@pytest.mark.parametrize(
    ("name", "value", "where", "fault"),
    [
        (MATRIX, 0, (), rf"row 0 of {MATRIX} (Q8_0) is all zeros, and not in full precision"),
        (EXPERTS, 0, (5,), f"row 200 of {EXPERTS} (Q8_0) is all zeros"),
        (
            EXPERTS,
            np.inf,
            (5, 0, 7),
            f"row 200 of {EXPERTS} (Q8_0) holds NaN or infinity, where full precision does not",
        ),
        (MATRIX, lambda tensor: tensor[::-1], (), f"{MATRIX} (Q8_0) has a squared error of "),
        (EXPERTS, lambda tensor: 1.2 * tensor[2], (2,), f"expert 2 of {EXPERTS} (Q8_0) has a squared error of 0.04"),
        (NORM, 0.5, (3,), f"{NORM} (F32) has a squared error of "),
    ],
)
def test_other_values_than_the_models_are_found(full, weights, tmp_path, name, value, where, fault):
    fault_found = value_fault(full, write(tmp_path / "q.gguf", changed(weights, name, value, *where), "Q8_0"))
    assert fault_found.startswith(fault)
    assert "tensors in all" not in fault_found


def test_several_tensors_at_fault_are_counted(full, weights, tmp_path):
    zeros = {name: np.zeros_like(tensor) for name, tensor in weights.items()}
    message = value_fault(full, write(tmp_path / "q.gguf", zeros, "Q4_0"))
    assert message == f"row 0 of {MATRIX} (Q4_0) is all zeros, and not in full precision (3 tensors in all)"


def test_rows_and_experts_that_weigh_nothing_do_not_count(weights, tmp_path):
    """The scales of a quantized type cannot hold the tiny values of tokens that were never trained."""
    tiny = changed(changed(weights, MATRIX, 1e-9, slice(0, 90)), EXPERTS, 1e-9, 6)
    full = write(tmp_path / "full.gguf", tiny, "F32")
    quantized = write(tmp_path / "q.gguf", tiny, "Q4_0")
    assert not read_weights(quantized, MATRIX)[:90].any()
    assert value_fault(full, quantized) == ""


def test_a_tensor_of_zeros_and_rows_without_a_number_stay_what_they_are(weights, tmp_path):
    odd = changed(changed(weights, MATRIX, 0), EXPERTS, np.nan, 0, 0, 0)
    full = write(tmp_path / "full.gguf", odd, "F32")
    assert value_fault(full, write(tmp_path / "q.gguf", odd, "BF16")) == ""


def test_what_f16_cannot_hold_is_found(weights, tmp_path):
    full = write(tmp_path / "full.gguf", changed(weights, MATRIX, 1e5, 0, 0), "F32")
    message = value_fault(full, write(tmp_path / "f16.gguf", changed(weights, MATRIX, np.inf, 0, 0), "F16"))
    assert message == f"row 0 of {MATRIX} (F16) holds NaN or infinity, where full precision does not"


def test_another_shape_is_found(full, weights, tmp_path):
    quantized = write(tmp_path / "q.gguf", weights | {MATRIX: weights[MATRIX].reshape(192, 128)}, "Q8_0")
    assert value_fault(full, quantized) == f"{MATRIX} (Q8_0) has another shape than in full precision"


def test_a_file_of_zeros_does_not_become_a_candidate(tiny_gguf, toolchain, tmp_path):
    plan = stock_plan(OpenTarget.open(tiny_gguf, toolchain), "Q4_K_M")
    model = quantize(tiny_gguf, plan, tmp_path, toolchain, provenance={})
    whole = tmp_path / model.file
    (place,) = [tensor for tensor in open_gguf(whole).tensors if tensor.name == "blk.1.attn_q.weight"]
    partial = tmp_path / "zeros.gguf.partial"
    content = bytearray(whole.read_bytes())
    content[place.data_offset : place.data_offset + place.n_bytes] = bytes(place.n_bytes)
    partial.write_bytes(content)
    with pytest.raises(
        ToolError, match=r"plan Q4_K_M is not the model: row 0 of blk\.1\.attn_q\.weight \(Q4_K\) is all"
    ):
        accept(partial, plan, {}, tiny_gguf)
    assert not (tmp_path / "zeros.gguf").exists()
    other = write_tiny_gguf(tmp_path / "other.gguf", seed=1)
    partial.write_bytes(whole.read_bytes())
    with pytest.raises(ToolError, match=r"is not the model: .* has a squared error of .* and Q\d_K stays below"):
        accept(partial, plan, {}, other)


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("place", [(MATRIX, 95, 255), (EXPERTS, 7, 0, 0), (NORM, 3)])
def test_a_value_that_is_no_number_is_found(weights, tmp_path, kind, value, place):
    name, *where = place
    path = write(tmp_path / "odd.gguf", changed(weights, name, value, *where), kind)
    assert first_not_finite(path) == (name, not np.isnan(value))


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
def test_the_largest_number_of_a_type_is_one(weights, tmp_path, kind):
    largest = {"F16": 65504.0, "BF16": 3.3895e38, "F32": 3.4e38}[kind]
    path = write(tmp_path / "large.gguf", changed(weights, MATRIX, largest, 5, 7), kind)
    assert np.isfinite(read_weights(path, MATRIX)).all() and read_weights(path, MATRIX).max() > 0.9 * largest
    assert first_not_finite(path) is None


def test_only_a_quantized_file_can_be_quantized_again(full, weights, tmp_path):
    assert logits_not_finite(full).endswith(
        "full.gguf gives logits that are not finite; get the model again, or choose another one"
    )
    quantized = write(tmp_path / "q.gguf", weights, "Q8_0")
    assert logits_not_finite(quantized, " in chunk 2").endswith("not finite in chunk 2; quantize it again")
