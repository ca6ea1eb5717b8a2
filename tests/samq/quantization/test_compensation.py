import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from samq.allocation.ladder import make_rung
from samq.allocation.target import OpenTarget
from samq.errors import SamqError
from samq.gguf.codes import TYPES_WITH_CODES, CodeGrid, read_codes, write_codes
from samq.gguf.file import open_gguf, read_metadata, read_tensors, read_weights
from samq.quantization.compensation import Compensator, compensate, compensate_rung, compensated_prices
from samq.records import Price, PriceTable, TensorPrices
from samq.sensitivity.gram import GramMatrices
from tests.conftest import write_tiny_gguf

DAMPING = 0.01


def random_gram(size, seed=0, correlation=0.9):
    """Of inputs that follow one another, some larger than others."""
    random = np.random.default_rng(seed)
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    scale = random.uniform(0.5, 2, size)
    return correlation**distance * np.outer(scale, scale)


@pytest.fixture(scope="module")
def target(toolchain, tmp_path_factory):
    return OpenTarget.open(write_tiny_gguf(tmp_path_factory.mktemp("full") / "tiny.gguf"), toolchain)


@pytest.fixture(scope="module")
def grams(target, tmp_path_factory):
    """Matrices of all inputs but the embedding's and one; queries, keys and values share one."""
    path = tmp_path_factory.mktemp("grams") / "gram.safetensors"
    source = {
        name: name.replace("attn_k", "attn_q").replace("attn_v", "attn_q")
        for name in target.quantizable
        if name not in ("token_embd.weight", "blk.1.ffn_up.weight")
    }
    matrices = {
        key: torch.tensor(random_gram(target.quantizable[key].row_length, seed), dtype=torch.float32)
        for seed, key in enumerate(sorted(set(source.values())))
    }
    save_file(matrices, path, metadata={"source": json.dumps(source)})
    return GramMatrices(path)


@pytest.fixture(scope="module", params=["Q2_K", "Q4_K", "IQ4_XS", "Q8_0"])
def rounded(request, target, grams, tmp_path_factory):
    """(type, llama-quantize's GGUF, the compensated one, what was said about it)."""
    folder = tmp_path_factory.mktemp("rounded")
    nearest = folder / make_rung(target, request.param, folder, provenance={}).file
    compensation = compensate(target.full.path, nearest, grams, folder / "compensated.gguf")
    return request.param, nearest, folder / "compensated.gguf", compensation


def output_error(path, target, grams, name):
    change = read_weights(path, name).astype(float) - read_weights(target.full.path, name)
    return np.einsum("ij,jk,ik->i", change, grams[name].double().numpy(), change)


def test_nothing_but_codes_changes(rounded):
    kind, nearest, compensated, _ = rounded
    assert read_metadata(compensated) == read_metadata(nearest)
    assert read_tensors(compensated) == read_tensors(nearest)
    for before, after in zip(open_gguf(nearest).tensors, open_gguf(compensated).tensors, strict=True):
        if before.tensor_type.name == kind:
            blocks = [np.array(tensor.data) for tensor in (before, after)]
            emptied = [write_codes(kind, data, np.zeros_like(read_codes(kind, data))) for data in blocks]
            assert (emptied[0] == emptied[1]).all()


def test_outputs_come_nearer_row_by_row_and_the_record_says_by_how_much(rounded, target, grams):
    _, nearest, compensated, compensation = rounded
    assert compensation.tensors.keys() == grams.source.keys()
    for name, error in compensation.tensors.items():
        before, after = (output_error(path, target, grams, name) for path in (nearest, compensated))
        assert (after <= before * (1 + 1e-4)).all()
        assert error.nearest == pytest.approx(before.sum(), rel=1e-3)
        assert error.compensated == pytest.approx(after.sum(), rel=1e-3)
        assert 0.1 < error.ratio < 0.75


def test_tensors_whose_input_was_not_measured_stay(rounded, grams):
    _, nearest, compensated, _ = rounded
    for before, after in zip(open_gguf(nearest).tensors, open_gguf(compensated).tensors, strict=True):
        assert (before.name in grams) == bool((before.data != after.data).any())


def test_a_rungs_tensors_become_what_they_become_in_a_whole_file(rounded, target, grams, tmp_path):
    _, nearest, compensated, compensation = rounded
    names = {"blk.0.attn_k.weight", "output.weight", "blk.1.ffn_up.weight"}  # the last was not measured
    of_rung = compensate_rung(target.full.path, nearest, names, grams, tmp_path / "some.gguf")
    assert of_rung.tensors == {name: compensation.tensors[name] for name in names - {"blk.1.ffn_up.weight"}}
    tensors = {tensor.name: tensor for tensor in open_gguf(tmp_path / "some.gguf").tensors}
    assert tensors.keys() == of_rung.tensors.keys()
    for tensor in open_gguf(compensated).tensors:
        if tensor.name in tensors:
            assert tensors[tensor.name].tensor_type == tensor.tensor_type
            assert (tensors[tensor.name].data == tensor.data).all()


def test_full_precision_stays(target, grams, tmp_path):
    compensation = compensate(target.full.path, target.full.path, grams, tmp_path / "out.gguf")
    assert compensation.tensors == {}
    assert (tmp_path / "out.gguf").read_bytes() == target.full.path.read_bytes()


def test_slabs_of_rows_do_not_matter(target, grams, rounded, tmp_path, monkeypatch):
    _, nearest, compensated, _ = rounded
    monkeypatch.setattr("samq.quantization.compensation._SLAB_WEIGHTS", 10_000)
    compensate(target.full.path, nearest, grams, tmp_path / "out.gguf")
    for one, other in zip(open_gguf(compensated).tensors, open_gguf(tmp_path / "out.gguf").tensors, strict=True):
        assert (one.data != other.data).mean() < 0.02  # a product over other rows may round to the other side of a tie


def test_codes_are_those_of_rounding_column_by_column_with_the_rest_free():
    """Against the plain way: after each column the best values of those to come, by least squares."""
    random, size = np.random.default_rng(3), 150  # more than a band
    gram, weights = random_gram(size), random.normal(0, 1, (6, size)).astype(np.float32)
    grid = CodeGrid(
        random.uniform(0.2, 0.4, weights.shape).astype(np.float32),
        random.uniform(-1.2, -0.8, weights.shape).astype(np.float32),
        np.arange(8, dtype=np.float32),
        2,
    )
    damped = gram + DAMPING * gram.diagonal().mean() * np.eye(size)
    order = np.argsort(-damped.diagonal(), kind="stable")
    error, expected = np.zeros(weights.shape), np.zeros(weights.shape, int)
    for count, column in enumerate(order):
        fixed, rest = order[:count], order[count:]
        shift = -error[:, fixed] @ damped[np.ix_(fixed, rest)] @ np.linalg.inv(damped[np.ix_(rest, rest)])
        value = weights[:, column] + shift[:, 0]
        levels = grid.scale[:, [column]] * grid.levels + grid.offset[:, [column]]
        expected[:, column] = np.abs(levels - value[:, None]).argmin(1)
        error[:, column] = levels[np.arange(len(levels)), expected[:, column]] - weights[:, column]
    codes = Compensator(torch.tensor(gram, dtype=torch.float32)).codes(weights, grid)
    assert (codes == expected + grid.first).mean() > 0.99
    assert codes.min() >= 2 and codes.max() <= 9


def prices_of(target):
    kinds = {kind: Price(bytes=10, kl_nats=0.5) for kind in ("F16", "Q4_K", "IQ3_S")}
    return PriceTable(
        gguf_sha256="g", map_digest="m", imatrix_sha256=None, sequence_tokens=(3, 4),
        tensors={name: TensorPrices(types=kinds, shares=(0.4, 0.6)) for name in target.quantizable},
    )  # fmt: skip


def test_prices_fall_by_what_the_inputs_tell_of_each_other(target, grams):
    table = compensated_prices(prices_of(target), grams)
    assert table.rounding == "compensated"
    for name, tensor in table.tensors.items():
        share = 1.0
        if name in grams:
            damped = grams[name].double().numpy()
            damped = damped + DAMPING * damped.diagonal().mean() * np.eye(len(damped))
            order = np.argsort(-damped.diagonal(), kind="stable")
            # What is left of each input's variance once those after it are known: Cholesky's diagonal, from the last on.
            left = np.linalg.cholesky(damped[np.ix_(order[::-1], order[::-1])]).diagonal()[::-1] ** 2
            column, rest = order[7], order[8:]
            coefficients = np.linalg.solve(damped[np.ix_(rest, rest)], damped[rest, column])
            assert left[7] == pytest.approx(damped[column, column] - damped[column, rest] @ coefficients)
            share = left.sum() / damped.trace()
            assert share < 0.5
        assert tensor.types["Q4_K"].kl_nats == pytest.approx(0.5 * share, rel=1e-3)
        assert tensor.types["IQ3_S"].kl_nats == 0.5 and "IQ3_S" not in TYPES_WITH_CODES
        assert tensor.shares == (0.4, 0.6)


def test_a_matrix_that_cannot_be_inverted_is_an_error(target, tmp_path):
    gram = torch.diag(torch.linspace(-1, 2, 256))
    save_file(
        {"output.weight": gram}, tmp_path / "gram", metadata={"source": json.dumps({"output.weight": "output.weight"})}
    )
    with pytest.raises(
        SamqError, match=r"the Gram matrix of output\.weight cannot be inverted .*; measure it on more text"
    ):
        compensated_prices(prices_of(target), GramMatrices(tmp_path / "gram"))


def test_an_output_that_cannot_be_written_is_an_error(target, grams, tmp_path):
    with pytest.raises(SamqError, match=r"cannot write .*out\.gguf: No such file or directory"):
        compensate(target.full.path, target.full.path, grams, tmp_path / "nowhere" / "out.gguf")
    with pytest.raises(SamqError, match=r"cannot write .*out\.gguf: No such file or directory"):
        compensate_rung(target.full.path, target.full.path, (), grams, tmp_path / "nowhere" / "out.gguf")


def test_weights_that_are_held_exactly_stay(target, grams, toolchain, tmp_path):
    """As when the full-precision file was itself made from a quantized one."""
    (tmp_path / "rung").mkdir()
    nearest = tmp_path / "rung" / make_rung(target, "Q8_0", tmp_path / "rung", provenance={}).file
    full = tmp_path / "full.gguf"
    full.write_bytes(target.full.path.read_bytes())
    with open(full, "r+b") as file:
        for tensor in open_gguf(target.full.path).tensors:
            if tensor.name in grams.source:
                file.seek(tensor.data_offset)
                file.write(read_weights(nearest, tensor.name).astype(np.float16).tobytes())
    again = tmp_path / make_rung(OpenTarget.open(full, toolchain), "F16", tmp_path, provenance={}).file
    assert compensate(full, again, grams, tmp_path / "out.gguf").tensors == {}
    assert compensate_rung(full, again, grams.source, grams, tmp_path / "some.gguf").tensors == {}
    kept = {tensor.name: tensor for tensor in open_gguf(tmp_path / "some.gguf").tensors}
    for tensor in open_gguf(again).tensors:
        assert tensor.name not in kept or (kept[tensor.name].data == tensor.data).all()


def test_a_gguf_of_another_model_is_refused_before_anything_is_written(target, grams, tmp_path):
    other = write_tiny_gguf(tmp_path / "other.gguf", blocks=3)
    with pytest.raises(SamqError, match=r"other.gguf and .*tiny.gguf do not hold the same tensors"):
        compensate(target.full.path, other, grams, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
