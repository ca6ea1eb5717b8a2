import gguf
import numpy as np
import pytest

from samq.allocation.target import OpenTarget
from samq.allocation.types import uniform_plan
from samq.errors import SamqError
from samq.gguf.file import open_gguf, read_tensors
from samq.gguf.formats import NEEDS_IMATRIX, TYPES
from samq.gguf.imatrix import importances
from samq.gguf.nearest import NearestRounding
from samq.llamacpp.quantize import quantize
from tests.conftest import LOW_BIT_TABLES, write_stacked_gguf, write_tiny_gguf
from tests.samq.tiny_imatrix import write_tiny_imatrix


def no_token_for_the_second(sums, counts):
    sums[1] = counts[1] = 0
    counts[2] = 7


SOURCES = ("dense", "experts in BF16", "experts in F32")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Name -> (full-precision GGUF, importance matrix)."""
    folder = tmp_path_factory.mktemp("sources")
    files = {"dense": write_tiny_gguf(folder / "dense.gguf", blocks=1)}
    files |= {
        name: write_stacked_gguf(folder / f"{name}.gguf", gguf.GGMLQuantizationType[name.split()[-1]])
        for name in SOURCES[1:]
    }
    without = {"dense": ["token_embd.weight"]}
    changed = {"blk.0.ffn_gate_exps.weight": no_token_for_the_second}
    return {
        name: (full, write_tiny_imatrix(folder / f"{name}.imatrix", full, without.get(name, ()), changed))
        for name, full in files.items()
    }


def expect_the_same_bytes(full, imatrix, kind, toolchain, folder):
    target = OpenTarget.open(full, toolchain, imatrix)
    model = quantize(full, uniform_plan(target, kind), folder, toolchain, provenance={}, imatrix=target.imatrix)
    nearest, looked_at = NearestRounding(full, imatrix), 0
    for tensor in open_gguf(folder / model.file).tensors:
        if tensor.name in target.quantizable:
            stored = np.array(tensor.data).view(np.uint8).reshape(nearest.rows(tensor.name), -1)
            for rows in (
                slice(None),
                slice(3, 70),
                slice(70, 71),
                np.array([0, 2, 3, 39, 40, 63]),
            ):  # across experts, and within
                blocks = nearest.blocks(tensor.name, tensor.tensor_type.name, rows)
                assert (blocks == stored[rows]).all(), (tensor.name, tensor.tensor_type.name)
            looked_at += 1
    assert looked_at == len(target.quantizable)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("dense", kind, marks=[pytest.mark.slow] if kind in LOW_BIT_TABLES else [])
        for kind in TYPES
        if kind != "F32"
    ]
    + [("experts in BF16", kind) for kind in ("IQ2_XXS", "Q3_K", "Q4_K", "IQ4_XS", "Q5_1", "Q8_0", "F16")]
    + [("experts in F32", "Q4_K")],
)
def test_bytes_are_those_of_llama_quantize(sources, toolchain, tmp_path, name, kind):
    expect_the_same_bytes(*sources[name], kind, toolchain, tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"), [("dense", "Q4_K"), ("experts in BF16", "Q6_K"), ("experts in F32", "IQ4_XS")]
)
def test_so_they_are_without_an_importance_matrix(sources, toolchain, tmp_path, name, kind):
    assert kind not in NEEDS_IMATRIX
    expect_the_same_bytes(sources[name][0], None, kind, toolchain, tmp_path)


@pytest.mark.parametrize("name", SOURCES)
def test_a_type_that_the_file_has_is_left_as_it_is(sources, name):
    full, imatrix = sources[name]
    nearest = NearestRounding(full, imatrix)
    for tensor in open_gguf(full).tensors:
        blocks = nearest.blocks(tensor.name, tensor.tensor_type.name, slice(None))
        assert blocks.tobytes() == np.array(tensor.data).tobytes()


def test_importances_are_means_and_ones_where_no_token_came(tmp_path):
    full = write_stacked_gguf(tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.F32)
    name, seen = "blk.0.ffn_gate_exps.weight", []

    def change(sums, counts):
        no_token_for_the_second(sums, counts)
        seen.append(sums.copy())

    path = write_tiny_imatrix(tmp_path / "imatrix.gguf", full, changed={name: change})
    means = importances(path, read_tensors(full))[name]
    assert (means[0] == seen[0][0]).all() and (means[1] == 1).all()
    assert (means[2] == seen[0][2] / np.float32(7)).all()


def test_a_file_that_ends_too_early_is_an_error(tmp_path):
    full = write_tiny_gguf(tmp_path / "tiny.gguf", blocks=1)
    nearest = NearestRounding(full)
    with open(full, "r+b") as file:
        file.truncate(full.stat().st_size - 4096)
    with pytest.raises(SamqError, match=r"ends within output\.weight; copy or convert it again"):
        nearest.weights("output.weight", slice(None))
