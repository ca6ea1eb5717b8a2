import json
import os
import sys
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

from samq.errors import SamqError
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.hf_model import load_model
from samq.sensitivity.published_types import dequantize_fp8
from tests.published import (
    FP4,
    compressed_fp8,
    edit_config,
    publish_in_compressed_fp8,
    publish_in_fp8,
    publish_in_mxfp4,
    tensors_of,
    tiny_gpt_oss,
    tiny_mistral3,
)
from tests.tiny_models import save_folder, tiny_llama, tiny_mixtral


@pytest.fixture(scope="module")
def converter(toolchain):
    """llama.cpp's converter as a module, in this process."""
    os.environ["NO_LOCAL_GGUF"] = "1"
    sys.path.insert(0, str(toolchain.converter.parent))
    try:
        from conversion import base, gpt_oss
    finally:
        sys.path.remove(str(toolchain.converter.parent))
        del os.environ["NO_LOCAL_GGUF"]
    return SimpleNamespace(ModelBase=base.ModelBase, GptOssModel=gpt_oss.GptOssModel)


def converted(converter, folder):
    """The tensors of a folder as llama.cpp's converter dequantizes them, by the file's names."""
    tensors = {name: lambda tensor=tensor: tensor for name, tensor in tensors_of(folder).items()}
    hparams = json.loads((folder / "config.json").read_text())
    model = SimpleNamespace(hparams=hparams, model_tensors=tensors, lazy=False, _is_nvfp4=False, _fp8_as_q8=False)
    converter.ModelBase.dequant_model(model)
    return {name: tensor().float() for name, tensor in tensors.items()}


def loaded(folder, **arguments):
    model, _ = load_model(describe_source(folder), device="cpu", **arguments)
    return dict(model.named_parameters())


@pytest.mark.parametrize("shape", [(192, 300), (576, 256), (100, 100), (3, 130, 256)])
def test_blocks_of_128_are_dequantized_as_by_llama_cpps_converter(converter, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand(*shape[:-2], *(-(-extent // 128) for extent in shape[-2:]))
    hparams = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    tensors = {"a.weight": lambda: weight, "a.weight_scale_inv": lambda: scale}
    model = SimpleNamespace(hparams=hparams, model_tensors=tensors, lazy=False, _is_nvfp4=False, _fp8_as_q8=False)
    converter.ModelBase.dequant_model(model)
    expected = tensors["a.weight"]()
    assert torch.equal(dequantize_fp8(weight, scale, [128, 128]), expected)
    last = tuple(extent - 1 for extent in shape)
    assert expected[last] == weight.float()[last] * scale[tuple(extent - 1 for extent in scale.shape)]


@pytest.mark.parametrize("publish", [publish_in_fp8, publish_in_compressed_fp8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_weights_of_a_model_in_fp8_get_one_type(tmp_path, publish, dtype):
    """The files hold embedding, norms and output in BF16."""
    folder = publish(save_folder(tiny_mixtral().bfloat16(), tmp_path / "tiny"), (16, 16))
    assert {weight.dtype for weight in loaded(folder, dtype=dtype).values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("publish", [publish_in_fp8, publish_in_compressed_fp8])
@pytest.mark.parametrize("block", [(16, 16), None])
def test_a_model_in_fp8_is_loaded_with_the_converters_values(converter, tmp_path, publish, block):
    folder = publish(save_folder(tiny_llama(), tmp_path / "tiny"), block)
    expected, original = converted(converter, folder), dict(tiny_llama().named_parameters())
    weights = loaded(folder)
    assert weights.keys() == expected.keys() == original.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float32 and torch.equal(weight, expected[name]), name
        assert torch.allclose(weight, original[name], rtol=0.07, atol=0.02), name
    assert sum(not torch.equal(weight, original[name]) for name, weight in weights.items()) == 14
    assert torch.equal(loaded(folder, dtype="bfloat16")["model.norm.weight"], expected["model.norm.weight"].bfloat16())


def test_experts_in_fp8_are_stacked_with_the_converters_values(converter, tmp_path):
    folder = publish_in_fp8(save_folder(tiny_mixtral(), tmp_path / "tiny"))
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight_scale_inv" in tensors_of(folder)
    expected, weights = converted(converter, folder), loaded(folder)
    stem = "model.layers.1.block_sparse_moe.experts"
    gate, up, down = (torch.stack([expected[f"{stem}.{e}.{w}.weight"] for e in range(4)]) for w in ("w1", "w3", "w2"))
    assert torch.equal(weights["model.layers.1.mlp.experts.gate_up_proj"], torch.cat([gate, up], 1))
    assert torch.equal(weights["model.layers.1.mlp.experts.down_proj"], down)


def test_a_multimodal_model_in_fp8_is_loaded_with_the_converters_values(converter, tmp_path):
    """As Ministral 3 is published: one scale a tensor, static scales of activations, the vision part in full precision."""
    folder = publish_in_fp8(save_folder(tiny_mistral3(), tmp_path / "tiny"), block=None)
    expected, weights = converted(converter, folder), loaded(folder)
    for name, weight in weights.items():
        published = name.replace("model.language_model.", "language_model.model.")
        published = published.replace("lm_head", "language_model.lm_head")
        assert torch.equal(weight, expected[published]), name


def test_experts_in_mxfp4_are_loaded_with_the_values_of_the_ggufs_blocks(converter, tmp_path, capfd):
    folder = publish_in_mxfp4(save_folder(tiny_gpt_oss(), tmp_path / "tiny"))
    tensors, weights, stored = tensors_of(folder), loaded(folder), {}
    assert "MXFP4" not in capfd.readouterr().err
    writer = SimpleNamespace(add_tensor=lambda name, data, raw_dtype: stored.update({name: data}))
    model = SimpleNamespace(gguf_writer=writer, transform_nibble_layout=None)
    model.transform_nibble_layout = lambda blocks: converter.GptOssModel.transform_nibble_layout(model, blocks)
    original = dict(tiny_gpt_oss().named_parameters())
    for proj in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{proj}"
        converter.GptOssModel.repack_mxfp4(model, name, tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
        values = gguf.dequantize(stored[name], gguf.GGMLQuantizationType.MXFP4)
        assert torch.equal(weights[name], torch.from_numpy(values).transpose(1, 2))
        assert torch.allclose(weights[name], original[name], rtol=0.25, atol=0.1) and weights[name].abs().max() > 0.3
        first = FP4[int(tensors[f"{name}_blocks"][2, 5, 0, 0]) & 15] * 2.0 ** (
            int(tensors[f"{name}_scales"][2, 5, 0]) - 127
        )
        assert weights[name][2, 0, 5] == np.float32(first)
    assert weights.keys() == original.keys()


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "mxfp4"},  # of a Llama, which llama.cpp's converter does not take
        compressed_fp8(strategy="tensor"),
        compressed_fp8(num_bits=4),
        compressed_fp8() | {"format": "pack-quantized"},
        compressed_fp8() | {"config_groups": dict.fromkeys("ab", compressed_fp8()["config_groups"]["group_0"])},
        {},
    ],
)
def test_other_quantized_models_are_refused(tmp_path, quantization):
    folder = save_folder(tiny_llama(), tmp_path / "tiny")
    edit_config(folder, quantization_config=quantization or {"bits": 4})
    method = quantization.get("quant_method", "unknown method")
    with pytest.raises(SamqError, match=rf"is quantized already \({method}\); give the full-precision model"):
        describe_source(folder)


def test_a_quantization_that_only_the_text_part_names_is_refused_too(tmp_path):
    folder = save_folder(tiny_mistral3(), tmp_path / "tiny")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_config(folder, text_config={**text, "quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(SamqError, match=r"is quantized already \(gptq\)"):
        describe_source(folder)
