"""Tiny checkpoints as they are published: multimodal, in FP8, in MXFP4. Each is a folder that `save_folder` wrote, changed."""

import json

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    Gemma3Config,
    GptOssConfig,
    Mistral3Config,
    Qwen2_5_VLConfig,
)

from tests.tiny_models import SHAPE, VOCABULARY

VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
)
IMAGE = VOCABULARY - 1  # the token that stands for an image


def tiny_gpt_oss(seed=0):
    torch.manual_seed(seed)
    shape = {**SHAPE, "intermediate_size": 32, "head_dim": 16}
    config = GptOssConfig(
        **shape,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_mistral3(seed=0, tied=False):
    """As Mistral Small 3.1: the configuration of the whole does not say whether the embeddings are tied, the text's does."""
    torch.manual_seed(seed)
    config = Mistral3Config(
        text_config=dict(model_type="mistral", **SHAPE, tie_word_embeddings=tied),
        vision_config=dict(model_type="pixtral", **VISION, head_dim=8),
        image_token_index=IMAGE,
        tie_word_embeddings=tied,
    )
    return AutoModelForMultimodalLM.from_config(config).eval()


def tiny_gemma3(seed=0):
    torch.manual_seed(seed)
    tokens = dict(boi_token_index=IMAGE - 2, eoi_token_index=IMAGE - 1, image_token_index=IMAGE)
    config = Gemma3Config(
        text_config=dict(**SHAPE, head_dim=8, query_pre_attn_scalar=8, sliding_window=16),
        vision_config=VISION,
        mm_tokens_per_image=1,
        **tokens,
    )
    return AutoModelForMultimodalLM.from_config(config).eval()


def tiny_qwen2_5_vl(seed=0):
    torch.manual_seed(seed)
    rotary = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    vision = dict(
        depth=3, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[1]
    )
    config = Qwen2_5_VLConfig(
        text_config=dict(**SHAPE, rope_parameters=rotary),
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=IMAGE - 1,
    )
    return AutoModelForMultimodalLM.from_config(config).eval()


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def store(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def is_linear(name):
    """Whether published checkpoints have this weight in FP8."""
    return name.endswith("_proj.weight") or ".experts." in name


def _scales(weight, block):
    """The largest weight of each block over FP8's largest number."""
    rows, columns = (-(-extent // size) for extent, size in zip(weight.shape, block, strict=True))
    padded = torch.zeros(rows * block[0], columns * block[1])
    padded[: weight.shape[0], : weight.shape[1]] = weight.abs()
    return padded.reshape(rows, block[0], columns, block[1]).amax((1, 3)) / 448


def publish_in_fp8(folder, block=(16, 16)):
    """As DeepSeek-V3 with a block, of which the last in a matrix may be cut; without one as Ministral 3, a scale a tensor."""
    tensors = tensors_of(folder)
    for name in [name for name in tensors if is_linear(name) and "vis" not in name]:
        weight = tensors[name].float()
        scale = _scales(weight, block) if block else weight.abs().max() / 448
        spread = scale
        if block:
            spread = torch.kron(scale, torch.ones(block))[: weight.shape[0], : weight.shape[1]]
        tensors[name] = (weight / spread).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
        if not block:
            tensors[f"{name.removesuffix('weight')}activation_scale"] = torch.tensor(0.5)
    store(folder, tensors)
    method = {"quant_method": "fp8", "activation_scheme": "dynamic" if block else "static", "weight_block_size": block}
    edit_config(folder, quantization_config={**method, "fmt": "e4m3", "modules_to_not_convert": ["lm_head"]})
    return folder


def publish_in_compressed_fp8(folder, block=None):
    """As compressed-tensors writes it: a scale a row, or with `block` one a block."""
    tensors = tensors_of(folder)
    for name in [name for name in tensors if is_linear(name)]:
        weight = tensors[name].float()
        scale = _scales(weight, block or (1, weight.shape[1]))
        spread = torch.kron(scale, torch.ones(block))[: weight.shape[0], : weight.shape[1]] if block else scale
        tensors[name] = (weight / spread).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale.bfloat16()
    store(folder, tensors)
    edit_config(folder, quantization_config=compressed_fp8(block))
    return folder


def compressed_fp8(block=None, **weights):
    strategy = {"strategy": "block", "block_structure": block} if block else {"strategy": "channel"}
    weights = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "group_size": None,
        "dynamic": False,
        **strategy,
    } | weights
    groups = {
        "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "dynamic": True}}
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def _mxfp4(weight):
    """Blocks (..., row length / 32, 16) and scales (..., row length / 32), as uint8: the first weight is in the low half."""
    groups = weight.numpy().reshape(*weight.shape[:-1], -1, 32)
    exponent = np.floor(np.log2(np.abs(groups).max(-1))) - 2
    codes = np.abs((groups / 2 ** exponent[..., None])[..., None] - FP4).argmin(-1).astype(np.uint8)
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    return torch.from_numpy(blocks), torch.from_numpy((exponent + 127).astype(np.uint8))


def publish_in_mxfp4(folder):
    """As gpt-oss: the experts' weights in blocks of 32 that lie along a layer's inputs."""
    tensors = tensors_of(folder)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        blocks, scales = _mxfp4(tensors.pop(name).float().transpose(1, 2).contiguous())
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = blocks, scales
    store(folder, tensors)
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": left})
    return folder
