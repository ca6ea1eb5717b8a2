"""Layers that predict further tokens (MTP) are counted, and a GGUF that lacks them is told of."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from samq.llamacpp.convert import convert
from samq.llamacpp.prediction_layers import count_in_config, count_in_gguf, count_in_weights, left_out
from samq.sensitivity.checkpoint import describe_source
from tests.architectures.models import write_model
from tests.architectures.publishing import with_config, with_tensors
from tests.conftest import write_tiny_gguf

OWN = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.experts.7.up_proj.weight"]


@pytest.mark.parametrize(
    ("more", "layers"),
    [
        ([], 0),
        (["model.vision_tower.encoder.layers.26.norm.weight", "talker.model.layers.9.norm.weight"], 0),
        (["model.layers.2.eh_proj.weight", "model.layers.2.enorm.weight"], 1),
        (["model.layers.2.eh_proj.weight", "model.layers.3.eh_proj.weight"], 2),
        (["mtp.layers.0.mlp.up_proj.weight", "mtp.fc.weight"], 1),
        (["mtp.fc.weight"], 1),
        ([f"model.mtp.layers.{layer}.eh_proj.weight" for layer in range(3)], 3),
        (["model.mtp_block.0.mlp.up_proj.weight", "model.mtp_emb_norm.0.weight"], 1),
    ],
)
def test_layers_of_prediction_are_told_by_the_names_of_weights(more, layers):
    assert count_in_weights([*OWN, *more], layers=2) == layers


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({"num_hidden_layers": 2, "num_nextn_predict_layers": 1}, 1),  # GLM, DeepSeek, ERNIE
        ({"text_config": {"mtp_num_hidden_layers": 1}}, 1),  # Qwen3.5
        ({"use_mtp": True, "num_mtp_modules": 3, "mtp_transformer_layers": 1}, 3),  # MiniMax-M2
        ({"mtp_num_layers": 2, "mtp_loss_factor": 1}, 2),
        ({"num_nextn_predict_layers": None, "mtp_use_dedicated_embeddings": False, "mtp_layers_block_type": "*E"}, 0),
        ({"vision_config": {"num_mtp_layers": 1}}, 0),
    ],
)
def test_layers_of_prediction_are_told_by_a_configuration_in_each_familys_words(config, layers):
    assert count_in_config(config) == layers


def test_blocks_of_prediction_of_a_gguf_are_counted():
    assert count_in_gguf(["blk.1.attn_q.weight", "blk.2.nextn.eh_proj.weight", "blk.2.nextn.enorm.weight"]) == 1


@pytest.mark.parametrize(
    ("names", "kept", "sentence"),
    [
        ([*OWN, "model.layers.2.eh_proj.weight"], ["blk.2.nextn.eh_proj.weight"], None),
        (
            [*OWN, "model.layers.2.eh_proj.weight"],
            [],
            "lacks 1 layer for multi-token prediction (MTP): llama.cpp's converter does not keep them for TinyForCausalLM",
        ),
        (
            [*OWN, *(f"mtp.{layer}.eh_proj.weight" for layer in range(3))],
            ["blk.2.nextn.eh_proj.weight"],
            "lacks 2 layers for multi-token prediction (MTP): llama.cpp's converter does not keep them for TinyForCausalLM",
        ),
        (OWN, [], "lacks 1 layer for multi-token prediction (MTP): its files have no weights of them"),
    ],
)
def test_what_a_gguf_lacks_is_said_with_the_reason(tmp_path, names, kept, sentence):
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    config = {"architectures": ["TinyForCausalLM"], "num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert left_out(tmp_path, kept, is_converted=True) == sentence


@pytest.mark.slow
def test_layers_that_the_converter_leaves_out_are_warned_of(tmp_path, toolchain, caplog):
    """ERNIE 4.5's converter skips them."""
    folder = write_model("ERNIE 4.5 MoE", tmp_path / "tiny")
    with_tensors(lambda weights: {"model.mtp_linear_proj.0.weight": torch.zeros(256, 512)})(folder)
    with_config(num_nextn_predict_layers=1)(folder)
    (tmp_path / "out").mkdir()
    with caplog.at_level(logging.WARNING):
        convert(describe_source(folder), tmp_path / "out", toolchain)
    sentence = (
        "the GGUF of tiny lacks 1 layer for multi-token prediction (MTP): llama.cpp's converter does not keep them"
    )
    assert f"{sentence} for Ernie4_5_MoeForCausalLM" in caplog.messages


def test_a_given_gguf_without_the_layers_of_its_folder_is_warned_of(tmp_path, toolchain, caplog):
    folder = write_model("Llama", tmp_path / "folder")
    with_config(num_nextn_predict_layers=1)(folder)
    (tmp_path / "out").mkdir()
    source = describe_source(write_tiny_gguf(tmp_path / "tiny.gguf"), hf_folder=folder)
    with caplog.at_level(logging.WARNING):
        convert(source, tmp_path / "out", toolchain)
    assert [line for line in caplog.messages if line.endswith("(MTP): the GGUF that was given does not have them")]
