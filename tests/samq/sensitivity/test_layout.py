import numpy as np
import pytest
import torch

from samq.errors import SamqError
from samq.gguf.file import read_weights
from samq.sensitivity.layout import read_layout, rotary_row_order, row_orders, weights_of
from tests.tiny_models import names_of, tiny_gpt2, tiny_llama, tiny_mixtral, write_llama_gguf


def test_tied_weights_come_once_under_the_embeddings_name():
    model = tiny_llama(tied=True)
    names = [weight.name for weight in weights_of(model, names_of(model))]
    assert "token_embd.weight" in names and "output.weight" not in names
    untied = tiny_llama()
    assert {weight.name for weight in weights_of(untied, names_of(untied))} == {*names, "output.weight"}
    assert len(names) == len(set(names)) == 1 + 2 * 7


def test_fused_experts_are_the_tensors_that_llama_cpp_has():
    model = tiny_mixtral()
    weights = {weight.name: weight for weight in weights_of(model, names_of(model))}
    assert weights["blk.1.ffn_gate_exps.weight"].shape == weights["blk.1.ffn_up_exps.weight"].shape == (4, 40, 32)
    assert weights["blk.1.ffn_down_exps.weight"].shape == (4, 32, 40)
    experts = model.model.layers[1].mlp.experts.gate_up_proj.detach()
    up = weights["blk.1.ffn_up_exps.weight"]
    assert torch.equal(up.view(up.parameter.detach()), experts[:, 40:])


def test_gpt2s_weights_are_turned():
    model = tiny_gpt2()
    weights = {weight.name: weight for weight in weights_of(model, names_of(model, "gpt2"))}
    assert weights["blk.0.ffn_up.weight"].shape == (128, 32)
    assert weights["blk.0.attn_qkv.weight"].shape == (96, 32)


def test_a_tensor_that_several_parameters_make_up_is_left_out():
    model = tiny_llama()
    names = names_of(model)
    weights = {weight.name for weight in weights_of(model, lambda name: names(name.replace("k_proj", "v_proj")))}
    assert "blk.0.attn_q.weight" in weights and not weights & {"blk.0.attn_k.weight", "blk.0.attn_v.weight"}


def test_a_weight_of_an_unknown_layout_is_not_measured_and_says_why(tmp_path):
    model = tiny_llama()
    path = write_llama_gguf(model, tmp_path / "model.gguf")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.copy_(model.model.layers[1].mlp.up_proj.weight.flip(0))
    layout = read_layout(model, names_of(model), path)
    assert list(layout.unknown) == ["blk.1.ffn_up.weight"]
    assert "is not torch's weight" in layout.unknown["blk.1.ffn_up.weight"]
    every = {weight.name for weight in weights_of(model, names_of(model))}
    assert {weight.name for weight in weights_of(model, layout.names)} == every - {"blk.1.ffn_up.weight"}
    assert set(layout.row_orders) == {f"blk.{block}.attn_{kind}.weight" for block in (0, 1) for kind in "qk"}


def test_a_gguf_most_of_whose_weights_are_others_is_refused(tmp_path):
    path, model = write_llama_gguf(tiny_llama(seed=1), tmp_path / "other.gguf"), tiny_llama(seed=0)
    with pytest.raises(SamqError, match=r"100 % of the GGUF's weights cannot be told from this model: token_embd"):
        read_layout(model, names_of(model), path)


def test_a_model_without_gguf_names_is_refused():
    with pytest.raises(SamqError, match="no weight of LlamaForCausalLM has a GGUF name"):
        weights_of(tiny_llama(), lambda name: None)


def test_row_orders_turn_torchs_rows_into_the_files(tmp_path):
    model = tiny_llama()
    path = write_llama_gguf(model, tmp_path / "model.gguf")
    weights = weights_of(model, names_of(model))
    orders = row_orders(weights, path)
    assert set(orders) == {f"blk.{block}.attn_{kind}.weight" for block in (0, 1) for kind in "qk"}
    for weight in weights:
        values = weight.parameter.detach().numpy()
        values = values[orders[weight.name]] if weight.name in orders else values
        np.testing.assert_array_equal(values.astype(np.float16), read_weights(path, weight.name).astype(np.float16))


def test_unpermuted_files_need_no_order(tmp_path):
    model = tiny_llama()
    assert row_orders(weights_of(model, names_of(model)), write_llama_gguf(model, tmp_path / "m.gguf", False)) == {}


def test_the_rotary_order_interleaves_the_halves_of_each_head():
    assert rotary_row_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_another_models_gguf_is_refused(tmp_path):
    path = write_llama_gguf(tiny_llama(seed=1), tmp_path / "other.gguf")
    model = tiny_llama(seed=0)
    with pytest.raises(SamqError, match=r"token_embd\.weight in .* is not torch's weight, in any order of rows that"):
        row_orders(weights_of(model, names_of(model)), path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1e5, r"blk\.1\.ffn_down\.weight of the model has weights up to 1e\+05 and F16 ends at 65504.*to BF16"),
        (float("nan"), r"blk\.1\.ffn_down\.weight of the model holds NaN or infinity; download the checkpoint again"),
    ],
)
def test_values_that_cannot_be_stored_are_no_wrong_order_of_rows(tmp_path, value, message):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    with np.errstate(over="ignore"):
        path = write_llama_gguf(model, tmp_path / "model.gguf")
    with pytest.raises(SamqError, match=message):
        row_orders(weights_of(model, names_of(model)), path)


def test_an_unknown_order_of_rows_is_refused(tmp_path):
    model = tiny_llama()
    path = write_llama_gguf(model, tmp_path / "model.gguf")
    with torch.no_grad():
        rows = model.model.layers[1].self_attn.k_proj.weight
        rows.copy_(rows.flip(0))
    with pytest.raises(SamqError, match=r"blk\.1\.attn_k\.weight in .* in any order of rows that SAMQ knows"):
        row_orders(weights_of(model, names_of(model)), path)


def test_a_missing_tensor_is_named(tmp_path):
    path = write_llama_gguf(tiny_llama(tied=True), tmp_path / "tied.gguf")
    model = tiny_llama()
    with pytest.raises(SamqError, match=r"output\.weight is \(64, 32\) in torch, but .* has no such tensor"):
        row_orders(weights_of(model, names_of(model))[-1:], path)
