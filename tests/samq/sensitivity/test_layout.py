import numpy as np
import pytest
import torch

from samq.errors import SamqError
from samq.gguf.file import read_weights
from samq.sensitivity.layout import read_layout, weights_of
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
        rows = model.model.layers[1].self_attn.k_proj.weight
        rows.copy_(rows.flip(0))
    layout = read_layout(model, names_of(model), path)
    assert set(layout.unknown) == {"blk.1.ffn_up.weight", "blk.1.attn_k.weight"}
    assert "is not torch's weight in any way" in layout.unknown["blk.1.ffn_up.weight"]
    every = {weight.name for weight in weights_of(model, names_of(model))}
    assert {weight.name for weight in layout.weights} == every - layout.unknown.keys()


def test_a_tensor_that_torch_lacks_is_not_measured_and_says_why(tmp_path):
    model = tiny_llama(tied=True)
    extra = np.ones((64, 32), np.float16)
    path = write_llama_gguf(model, tmp_path / "m.gguf", more=lambda w: w.add_tensor("blk.2.attn_q.weight", extra))
    layout = read_layout(model, names_of(model), path)
    assert layout.unknown == {"blk.2.attn_q.weight": "blk.2.attn_q.weight: torch has no weight of its name"}


def test_a_tied_weight_that_the_gguf_has_twice_is_measured_by_its_uses(tmp_path):
    model = tiny_llama(tied=True)
    copied = model.lm_head.weight.detach().numpy().astype(np.float16)
    path = write_llama_gguf(model, tmp_path / "m.gguf", more=lambda w: w.add_tensor("output.weight", copied))
    layout = read_layout(model, names_of(model), path)
    users = {weight.name: weight.user for weight in layout.weights if weight.user is not None}
    assert users == {"token_embd.weight": model.model.embed_tokens, "output.weight": model.lm_head}
    assert not layout.unknown


def test_a_tensor_that_the_gguf_lacks_is_named(tmp_path):
    path = write_llama_gguf(tiny_llama(tied=True), tmp_path / "tied.gguf")
    model = tiny_llama()
    model.model.load_state_dict(tiny_llama(tied=True).model.state_dict())
    layout = read_layout(model, names_of(model), path)
    assert "output.weight is a weight in torch, and" in layout.unknown["output.weight"]


def test_another_models_gguf_is_refused(tmp_path):
    path, model = write_llama_gguf(tiny_llama(seed=1), tmp_path / "other.gguf"), tiny_llama(seed=0)
    with pytest.raises(SamqError, match=r"100 % of the GGUF's weights cannot be told from this model: token_embd"):
        read_layout(model, names_of(model), path)


def test_a_model_without_gguf_names_is_refused():
    with pytest.raises(SamqError, match="no weight of LlamaForCausalLM has a GGUF name"):
        weights_of(tiny_llama(), lambda name: None)


def test_views_turn_torchs_weights_into_the_files(tmp_path):
    model = tiny_llama()
    path = write_llama_gguf(model, tmp_path / "model.gguf")
    weights = {weight.name: weight for weight in read_layout(model, names_of(model), path).weights}
    assert weights.keys() == {weight.name for weight in weights_of(model, names_of(model))}
    for name, weight in weights.items():
        values = weight.view(weight.parameter.detach()).half().float().numpy()
        np.testing.assert_array_equal(values, read_weights(path, name))
    ordered = {name for name, weight in weights.items() if weight.view.rows is not None}
    assert ordered == {f"blk.{block}.attn_{kind}.weight" for block in (0, 1) for kind in "qk"}


def test_rows_in_torchs_order_need_no_view_of_their_own(tmp_path):
    model = tiny_llama()
    layout = read_layout(model, names_of(model), write_llama_gguf(model, tmp_path / "m.gguf", permute=False))
    assert all(weight.view.rows is None for weight in layout.weights) and not layout.unknown


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1e5, r"blk\.1\.ffn_down\.weight of the model has weights up to 1e\+05 and F16 ends at 65504.*to BF16"),
        (float("nan"), r"blk\.1\.ffn_down\.weight of the model holds NaN or infinity; download the checkpoint again"),
    ],
)
def test_values_that_cannot_be_stored_are_no_unknown_layout(tmp_path, value, message):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    with np.errstate(over="ignore"):
        path = write_llama_gguf(model, tmp_path / "model.gguf")
    with pytest.raises(SamqError, match=message):
        read_layout(model, names_of(model), path)
