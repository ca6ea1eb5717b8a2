import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from samq.data.tokens import batches
from samq.errors import SamqError
from samq.sensitivity.gram import GramMatrices, measure_gram, without_layer
from samq.sensitivity.layout import Weight, weights_of
from samq.sensitivity.views import View
from tests.tiny_models import names_of, random_tokens, tiny_gpt2, tiny_llama, tiny_mixtral

MODELS = {
    "untied llama": (tiny_llama, "llama"),
    "tied llama": (lambda: tiny_llama(tied=True), "llama"),
    "mixtral": (tiny_mixtral, "llama"),
    "gpt2": (tiny_gpt2, "gpt2"),
}


def gram_of(model, tokens, path, architecture="llama", **arguments):
    measure_gram(model, tokens, path, weights_of(model, names_of(model, architecture)), **arguments)


def inputs_of(model, tokens, names):
    """GGUF name -> the input of the linear layer, over all tokens, sequence by sequence."""
    by_parameter = {id(weight.parameter): weight.name for weight in weights_of(model, names)}
    inputs_by_name = {}

    def keep(module, inputs):
        inputs_by_name.setdefault(by_parameter[id(module.weight)], []).append(inputs[0].flatten(0, -2).double())

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and id(m.weight) in by_parameter]
    handles = [layer.register_forward_pre_hook(keep) for layer in layers]
    with torch.no_grad():
        for ids, _, _ in batches(tokens, 1):
            model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).numpy() for name, parts in inputs_by_name.items()}


@pytest.mark.parametrize("memory_bytes", [1, 10_000, 2**30])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", MODELS)
def test_matrices_are_the_mean_products_of_what_enters(kind, batch_size, memory_bytes, tmp_path):
    make, architecture = MODELS[kind]
    model, tokens, path = make(), random_tokens(), tmp_path / "gram.safetensors"
    names = names_of(model, architecture)
    gram_of(model, tokens, path, architecture, batch_size=batch_size, memory_bytes=memory_bytes)
    grams, inputs_by_name = GramMatrices(path), inputs_of(model, tokens, names)
    assert set(grams.source) == set(inputs_by_name)
    for name, inputs in inputs_by_name.items():
        assert len(inputs) == tokens.lengths.sum()
        np.testing.assert_allclose(grams[name], inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-6)


def test_a_tensor_of_another_order_of_columns_has_the_matrix_of_that_order(tmp_path):
    model, tokens, path = tiny_llama(), random_tokens(), tmp_path / "gram.safetensors"
    attention, order = model.model.layers[0].self_attn, torch.randperm(32).numpy()
    weights = [
        Weight("plain", attention.o_proj.weight, View()),
        Weight("some rows", attention.q_proj.weight, View(rows=order[:5])),
        Weight("all rows", attention.q_proj.weight, View()),
    ]
    measure_gram(model, tokens, path, weights)
    plain = GramMatrices(path)
    assert plain.source["all rows"] == plain.source["some rows"] == "some rows"
    expected = plain["plain"][order][:, order]
    measure_gram(model, tokens, path, [Weight("turned", attention.o_proj.weight, View(columns=order))])
    torch.testing.assert_close(GramMatrices(path)["turned"], expected)


def test_layers_of_one_input_share_its_matrix(tmp_path):
    gram_of(tiny_llama(), random_tokens(), tmp_path / "gram.safetensors")
    grams = GramMatrices(tmp_path / "gram.safetensors")
    source = {name.removeprefix("blk.1."): key for name, key in grams.source.items() if name.startswith("blk.1.")}
    query = source["attn_q.weight"]
    assert source["attn_k.weight"] == source["attn_v.weight"] == query == "blk.1.attn_q.weight"
    assert source["ffn_up.weight"] == source["ffn_gate.weight"] not in (query, source["ffn_down.weight"])
    assert "output.weight" in grams and "token_embd.weight" not in grams


def test_stacked_experts_are_known_to_have_no_matrix():
    dense, experts = tiny_llama(), tiny_mixtral()
    assert without_layer(dense, weights_of(dense, names_of(dense))) == []
    assert without_layer(experts, weights_of(experts, names_of(experts))) == [
        f"blk.{block}.ffn_{part}.weight"
        for block in range(2)
        for part in ("gate_inp", "gate_exps", "up_exps", "down_exps")
    ]


def test_the_same_matrices_are_the_same_bytes(tmp_path):
    files = [tmp_path / name for name in "abcd"]
    for path in files:
        gram_of(tiny_llama(), random_tokens(), path)
    assert len({path.read_bytes() for path in files}) == 1


def test_an_input_that_is_always_zero_has_no_matrix(tmp_path):
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    gram_of(model, random_tokens(), tmp_path / "gram.safetensors")
    grams = GramMatrices(tmp_path / "gram.safetensors")
    assert "blk.0.ffn_down.weight" not in grams and "blk.1.ffn_down.weight" in grams


def test_nan_names_the_layer_and_writes_nothing(tmp_path):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(SamqError, match=r"the input of blk\.1\.ffn_down\.weight has NaN or Inf"):
        gram_of(model, random_tokens(), tmp_path / "gram.safetensors")
    assert not (tmp_path / "gram.safetensors").exists()


def test_progress_counts_the_sequences_of_all_passes(tmp_path):
    told = []
    progress = lambda done, total: told.append((done, total))  # noqa: E731
    path = tmp_path / "gram.safetensors"
    gram_of(tiny_llama(), random_tokens(), path, memory_bytes=10_000, batch_size=2, progress=progress)
    totals = {total for _, total in told}
    assert len(totals) == 1 and totals.pop() > 5
    assert [done for done, _ in told] == sorted(done for done, _ in told) and told[-1][0] == told[-1][1]


def test_a_missing_or_damaged_file_is_an_error(tmp_path):
    with pytest.raises(SamqError, match=r"cannot read Gram matrices from .*; measure them again"):
        GramMatrices(tmp_path / "nothing")
    (tmp_path / "cut").write_bytes(b"cut")
    with pytest.raises(SamqError, match=r"cannot read Gram matrices from .*; measure them again"):
        GramMatrices(tmp_path / "cut")
