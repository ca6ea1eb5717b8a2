"""Each view against what llama.cpp's converter does to the same parameter (its code, line by line, in torch)."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from samq.llamacpp.hf_converter import partial_rotary_order
from samq.sensitivity.views import (
    experts_apart,
    groups_of_qkv,
    half,
    heads_of_qkv,
    latent,
    linear_attention_groups,
    partly_rotary,
    rotary,
    rotary_row_order,
    storages,
    turned_every_other,
    turned_half,
    value_heads,
)

HEADS = SimpleNamespace(num_attention_heads=4, hidden_size=32, head_dim=None)
HALF = SimpleNamespace(
    num_attention_heads=4, hidden_size=32, head_dim=8, rope_parameters={"partial_rotary_factor": 0.5}
)
LATENT = SimpleNamespace(qk_nope_head_dim=6, v_head_dim=4)
LINEAR = SimpleNamespace(
    linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=4, linear_value_head_dim=5
)
DBRX = SimpleNamespace(ffn_config=SimpleNamespace(moe_num_experts=4))


def numbered(*shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape)


def by_llama_permute(weights, heads):
    """`LlamaModel.permute`."""
    return weights.reshape(heads, 2, len(weights) // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)


def by_bloom(weights, heads):
    """`BloomModel.modify_tensors` and `GPTNeoXModel.modify_tensors`."""
    qkv = weights.reshape(heads, 3, -1, weights.shape[1])
    return torch.cat([qkv[:, part].reshape(-1, weights.shape[1]) for part in range(3)])


def by_falcon(weights, heads, kv_heads, width):
    """`FalconModel.modify_tensors`."""
    qkv = weights.view(kv_heads, heads // kv_heads + 2, width, -1)
    parts = qkv[:, :-2], qkv[:, [-2]], qkv[:, [-1]]
    return torch.cat([part.reshape(-1, weights.shape[1]) for part in parts])


def by_deepseek(weights, part):
    """`DeepseekV2Model.modify_tensors`."""
    keys, values = torch.split(weights.view(-1, 10, weights.shape[1]), [6, 4], dim=1)
    return keys.transpose(1, 2) if part == "keys" else values


def by_qwen3_next(weights, wanted):
    """`Qwen3NextModel.modify_tensors`."""
    parts = weights.permute(1, 0).contiguous().view(-1, 2, 2 * 4 + 2 * 15)
    query, key, value, gate = (
        part.contiguous().view(weights.shape[1], -1) for part in torch.split(parts, [4, 4, 15, 15], dim=-1)
    )
    return (torch.cat([query, key, value], dim=-1) if wanted == "qkv" else gate).permute(1, 0)


def by_qwen35(weights, dim, width):
    """`_LinearAttentionVReorderBase._reorder_v_heads`."""
    shape = list(weights.shape)
    apart = weights.reshape(*shape[:dim], 2, 3, width, *shape[dim + 1 :])
    return apart.transpose(dim, dim + 1).reshape(shape)


def by_qwen35_qkv(weights):
    return torch.cat([weights[:16], by_qwen35(weights[16:], 0, 5)])


CASES = {
    "rotary": (rotary, HEADS, numbered(32, 3), lambda w: by_llama_permute(w, 4)),
    "rotary, fewer key heads": (rotary, HEADS, numbered(16, 3), lambda w: by_llama_permute(w, 2)),
    "partly rotary": (partly_rotary, HALF, numbered(16, 3), lambda w: w[partial_rotary_order(16, 8, 4)]),
    "heads of qkv": (heads_of_qkv, HEADS, numbered(96, 3), lambda w: by_bloom(w, 4)),
    "groups of qkv": (groups_of_qkv, HEADS, numbered(64, 3), lambda w: by_falcon(w, 4, 2, 8)),
    "one group of qkv": (groups_of_qkv, HEADS, numbered(48, 3), lambda w: by_falcon(w, 4, 1, 8)),
    "half, gate": (half(0), None, numbered(4, 6, 3), lambda w: w.split(3, dim=-2)[0]),
    "half, up": (half(1), None, numbered(4, 6, 3), lambda w: w.split(3, dim=-2)[1]),
    "half of a matrix": (half(1), None, numbered(6, 3), lambda w: w.split(3, dim=-2)[1]),
    "turned half": (turned_half(1), None, numbered(4, 3, 6), lambda w: w.transpose(-1, -2).split(3, dim=-2)[1]),
    "every other": (turned_every_other(1), None, numbered(4, 3, 6), lambda w: w.transpose(-1, -2)[:, 1::2]),
    "experts apart": (experts_apart(transposed=False), DBRX, numbered(24, 3), lambda w: w.view(4, 6, 3)),
    "experts turned": (experts_apart(transposed=True), DBRX, numbered(24, 3), lambda w: w.view(4, 6, 3).mT),
    "latent keys": (latent("keys"), LATENT, numbered(30, 7), lambda w: by_deepseek(w, "keys")),
    "latent values": (latent("values"), LATENT, numbered(30, 7), lambda w: by_deepseek(w, "values")),
    "linear qkv": (linear_attention_groups(0, 2), LINEAR, numbered(76, 3), lambda w: by_qwen3_next(w, "qkv")),
    "linear gate": (linear_attention_groups(3, 3), LINEAR, numbered(76, 3), lambda w: by_qwen3_next(w, "gate")),
    "value heads of qkv": (value_heads("rows"), LINEAR, numbered(46, 3), by_qwen35_qkv),
    "value heads of z": (value_heads("rows"), LINEAR, numbered(30, 3), lambda w: by_qwen35(w, 0, 5)),
    "value heads of a and b": (value_heads("rows"), LINEAR, numbered(6, 3), lambda w: by_qwen35(w, 0, 1)),
    "value heads of out": (value_heads("columns"), LINEAR, numbered(3, 30), lambda w: by_qwen35(w, 1, 5)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_view_is_what_the_converter_does(name):
    make, config, parameter, by_converter = CASES[name]
    view = make(config, tuple(parameter.shape))
    assert torch.equal(view(parameter), by_converter(parameter))


def test_shapes_that_a_view_does_not_fit_have_none():
    none = [
        rotary(HEADS, (30, 3)),
        heads_of_qkv(HEADS, (32, 3)),
        groups_of_qkv(HEADS, (96 + 8, 3)),
        latent("keys")(HEADS, (30, 7)),
        latent("keys")(LATENT, (32, 7)),
        linear_attention_groups(0, 2)(LINEAR, (74, 3)),
        value_heads("rows")(HEADS, (30, 3)),
        experts_apart(transposed=False)(HEADS, (24, 3)),
    ]
    assert none == [None] * len(none)


def test_heads_of_several_widths_have_no_view():
    layers = ["sliding_attention", "full_attention"]
    config = AutoConfig.for_model(
        "gemma4_text", num_hidden_layers=2, layer_types=layers, head_dim=8, global_head_dim=16
    )
    assert rotary(config, (32, 3)) is groups_of_qkv(config, (32, 3)) is None


def test_the_rotary_order_interleaves_the_halves_of_each_head():
    assert rotary_row_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_parameter_may_be_stored_in_several_ways_and_last_as_it_is():
    stem = "model.layers.3.self_attn."
    split, whole = storages(f"{stem}kv_b_proj.weight")
    assert split.keys() == {f"{stem}k_b_proj.weight", f"{stem}v_b_proj.weight"}
    assert list(whole) == [f"{stem}kv_b_proj.weight"]
    experts, *_ = storages("model.layers.3.mlp.experts.gate_up_proj")
    assert experts.keys() == {"model.layers.3.mlp.experts.gate_proj", "model.layers.3.mlp.experts.up_proj"}
    assert [list(storage) for storage in storages("model.norm.weight")] == [["model.norm.weight"]]
