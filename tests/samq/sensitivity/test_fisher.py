import numpy as np
import pytest
from safetensors.numpy import save_file

from samq.errors import SamqError
from samq.sensitivity.fisher import Fisher, Routing, load_fisher, routing, save_fisher


def random_fisher(*shape, seed=0):
    """Of weights whose Fisher information is a product, as it is where a tensor's tokens agree."""
    random = np.random.default_rng(seed)
    *experts, rows, columns = shape
    products = random.random((*experts, rows, 1)) * random.random((*experts, 1, columns))
    return Fisher(products.mean(axis=-1).astype(np.float32), products.mean(axis=-2).astype(np.float32)), products


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7)])
def test_a_product_is_kept_whole(shape):
    fisher, products = random_fisher(*shape)
    assert fisher.shape == shape
    np.testing.assert_allclose(fisher.rows[..., None] * fisher.profile()[..., None, :], products, rtol=1e-5)


def test_what_no_gradient_reaches_costs_nothing():
    fisher = Fisher(np.zeros((2, 3), np.float32), np.array([[0, 0, 0, 0], [1, 3, 0, 0]], np.float32))
    assert fisher.profile().tolist() == [[1, 1, 1, 1], [1, 3, 0, 0]]


def test_measurements_mix_by_their_tokens():
    (one, _), (other, _) = random_fisher(5, 7), random_fisher(5, 7, seed=1)
    mixed = one.mixed(0.25, other, 0.75)
    np.testing.assert_allclose(mixed.rows, 0.25 * one.rows + 0.75 * other.rows, rtol=1e-6)
    np.testing.assert_allclose(mixed.columns, 0.25 * one.columns + 0.75 * other.columns, rtol=1e-6)


def test_the_same_values_are_saved_as_the_same_bytes(tmp_path):
    fisher = {"blk.0.attn_q.weight": random_fisher(5, 7)[0], "blk.0.ffn_up_exps.weight": random_fisher(3, 5, 7)[0]}
    path = save_fisher(tmp_path / "a.safetensors", fisher)
    again = save_fisher(tmp_path / "b.safetensors", dict(reversed(fisher.items())))
    assert path.read_bytes() == again.read_bytes()
    loaded = load_fisher(path)
    assert loaded.keys() == fisher.keys()
    for name, one in loaded.items():
        assert np.array_equal(one.rows, fisher[name].rows) and np.array_equal(one.columns, fisher[name].columns)


def test_a_damaged_file_is_named(tmp_path):
    fisher = {"w": random_fisher(2, 2)[0]}
    path = save_fisher(tmp_path / "a.safetensors", fisher)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SamqError, match=r"cannot read Fisher information from .*a\.safetensors"):
        load_fisher(path)
    with pytest.raises(SamqError, match=r"cannot read Fisher information from .*lost"):
        load_fisher(tmp_path / "lost.safetensors")
    with pytest.raises(SamqError, match="cannot write"):
        save_fisher(tmp_path / "no" / "a.safetensors", fisher)


def test_a_file_of_blocks_as_it_was_once_is_refused(tmp_path):
    save_file({"blk.0.attn_q.weight": np.ones((2, 2), np.float32)}, tmp_path / "old.safetensors")
    with pytest.raises(SamqError, match="of this version"):
        load_fisher(tmp_path / "old.safetensors")


def test_experts_that_no_token_reached_are_counted_once_a_block():
    some = np.array([[1, 0], [0, 0], [0, 2]], np.float32)  # expert 1 of 3 has no gradient
    everywhere, columns = np.ones((3, 2), np.float32), np.ones((3, 4), np.float32)
    dense = Fisher(np.zeros(2, np.float32), np.zeros(4, np.float32))
    fisher = {"blk.0.attn_q.weight": dense}
    assert routing(fisher) == Routing() and not routing(fisher).missed
    for tensor in ("gate", "down"):
        fisher[f"blk.0.ffn_{tensor}_exps.weight"] = Fisher(some, columns)
        fisher[f"blk.1.ffn_{tensor}_exps.weight"] = Fisher(everywhere, columns)
    coverage = routing(fisher)
    assert coverage == Routing(6, {"blk.0": {1: 0}}) and coverage.missed == 1
    assert str(coverage) == "1 of 6 experts saw fewer than 64 calibration tokens (blk.0: 1 saw none)"
    assert str(Routing(6)) == "0 of 6 experts saw fewer than 64 calibration tokens"
    scarce = {f"blk.1.ffn_{tensor}_exps.weight": {2: 7, 0: 0} for tensor in ("gate", "down")}
    coverage = routing(fisher, scarce)
    assert coverage == Routing(6, {"blk.1": {0: 0, 2: 7}}) and coverage.missed == 1
    assert str(coverage) == "2 of 6 experts saw fewer than 64 calibration tokens (blk.1: 0 saw none, 2 saw 7)"
