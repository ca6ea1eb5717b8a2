"""Tiny random models of the architectures that people quantize, in folders as they are published."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.architectures.publishing import (
    copied_output,
    gemma_3n,
    glm_mtp,
    mimo_mtp,
    qwen_mtp,
    renamed_layers,
    vocabulary_model,
    with_config,
    with_tensors,
)
from tests.architectures.vocabularies import VOCABULARY, tokenizer_of
from tests.published import publish_in_compressed_fp8, publish_in_fp8, publish_in_mxfp4

SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)
MOE = dict(moe_intermediate_size=256, num_experts=8, num_experts_per_tok=2)
ROUTED = dict(n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=256)
LATENT = dict(kv_lora_rank=128, q_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=64, mamba_d_state=16, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=64)
LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64, linear_value_head_dim=64,
    linear_conv_kernel_dim=4,
)  # fmt: skip
VISION = dict(
    hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
)
QWEN_VISION = dict(depth=2, hidden_size=128, intermediate_size=256, num_heads=2, out_hidden_size=256)
IMAGES = dict(boi_token_index=500, eoi_token_index=501, image_token_index=502)


@dataclass(frozen=True)
class Architecture:
    """A model to make, and what is expected of it."""

    kind: str  # model_type of its configuration
    shape: dict[str, Any]
    tokenizer: str = "bytes"  # or sentencepiece, or pieces: SentencePiece's pieces in a tokenizer.json
    publish: tuple[Callable[[Path], None], ...] = ()  # changes that make the folder a published one
    often: bool = False  # tried by `make test`, and not only by `make test-architectures`
    budget: str = "7.5bpw"  # of a plan that has both types of the test's ladder
    agreement_nats: float = 1e-5  # at most between torch and llama.cpp


def llama_like(
    kind: str,
    *,
    often: bool = False,
    tokenizer: str = "bytes",
    publish: Any = (),
    budget: str = "7.5bpw",
    agreement_nats: float = 1e-5,
    **shape: Any,
) -> Architecture:
    """An architecture whose configuration has Llama's names."""
    whole = {name: value for name, value in (SHAPE | shape).items() if value != "left out"}
    return Architecture(
        kind, whole, tokenizer, publish if isinstance(publish, tuple) else (publish,), often, budget, agreement_nats
    )


def multimodal(kind: str, vision: dict[str, Any], *, whole: Any = None, publish: Any = (), **text: Any) -> Architecture:
    """A text model of `llama_like` in a multimodal one; `whole` is what the configuration says beside the two parts."""
    model = llama_like(kind, publish=publish, **text)
    return replace(model, shape={"text_config": model.shape, "vision_config": vision} | (whole or {}))


GEMMA = dict(head_dim=64, query_pre_attn_scalar=64, sliding_window=256)
GPT2 = dict(vocab_size=VOCABULARY, n_positions=256, n_embd=256, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
FALCON = dict(
    vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, parallel_attn=True, bias=False,
    alibi=False, bos_token_id=1, eos_token_id=2, max_position_embeddings=1024,
)  # fmt: skip
SSM = dict(
    vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=2, state_size=16, expand=2, conv_kernel=4, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
BLOOM = dict(vocab_size=VOCABULARY, hidden_size=256, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=512,
)  # fmt: skip
GRANITE4 = dict(
    shared_intermediate_size=512, layer_types=["mamba", "attention"], tie_word_embeddings=True,
    position_embedding_type="nope", **MAMBA,
)  # fmt: skip
GRANITE_SCALES = dict(
    embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22, attention_multiplier=0.015625
)
# llama.cpp takes the first 10 layers as sparse, and the first 20 as those with keys and values of their own
GEMMA3N_LAYERS = ["full_attention" if layer in (4, 9, 14, 19, 21) else "sliding_attention" for layer in range(22)]
HYBRID_LAYERS = ["sliding_attention", "full_attention"] * 2

ARCHITECTURES = {
    "Llama": llama_like("llama", tie_word_embeddings=False),
    "Llama 3": llama_like("llama", tie_word_embeddings=True, rope_scaling=LLAMA3),
    "Llama with biases": llama_like("llama", attention_bias=True, mlp_bias=True),
    "Llama, tied and stored twice": llama_like(
        "llama", often=True, tie_word_embeddings=True, publish=with_tensors(copied_output)
    ),
    "Mistral": llama_like("mistral", head_dim=64),
    "Mistral Nemo": llama_like("mistral", head_dim=128),
    "Ministral 3": llama_like("ministral3", head_dim=64),
    "Qwen2": llama_like("qwen2"),
    "Qwen2.5, tied": llama_like("qwen2", tie_word_embeddings=True),
    "Qwen2, padded vocabulary": llama_like("qwen2", tie_word_embeddings=True, vocab_size=640),
    "Qwen3": llama_like("qwen3", head_dim=64, tie_word_embeddings=True),
    "Gemma": llama_like("gemma", tokenizer="sentencepiece", head_dim=64),
    "Gemma 2": llama_like("gemma2", tokenizer="sentencepiece", **GEMMA),
    "Gemma 3": llama_like("gemma3_text", tokenizer="sentencepiece", **GEMMA),
    "Gemma 4": llama_like(
        "gemma4_text", tokenizer="pieces", head_dim=64, global_head_dim=128, num_hidden_layers=4,
        hidden_size_per_layer_input=64, vocab_size_per_layer_input=VOCABULARY, sliding_window=256, num_kv_shared_layers=0,
        layer_types=HYBRID_LAYERS, agreement_nats=1e-4,  # this random one amplifies F16's roundings; 4e-6 in F32
    ),
    "Gemma 3n": llama_like(
        "gemma3n_text", tokenizer="sentencepiece", hidden_size=128, intermediate_size=128, head_dim=32,
        sliding_window=256, num_hidden_layers=22,
        num_kv_shared_layers=2, layer_types=GEMMA3N_LAYERS, activation_sparsity_pattern=[0.95] * 10 + [0.0] * 12,
        vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=256, laurel_rank=64, altup_num_inputs=4,
        pad_token_id=0, publish=with_tensors(gemma_3n),
    ),
    "Phi-2": llama_like("phi", intermediate_size=1024, num_key_value_heads=4, partial_rotary_factor=0.5),
    "Phi-3": llama_like("phi3", sliding_window=256, original_max_position_embeddings=1024, publish=vocabulary_model),
    "GPT-2": Architecture("gpt2", GPT2, publish=(with_config(n_ctx=256),), often=True),
    "StarCoder": Architecture("gpt_bigcode", GPT2 | dict(n_inner=1024, multi_query=True), publish=(with_config(n_ctx=256),)),
    "StarCoder2": llama_like("starcoder2", use_bias=True),
    "GPT-NeoX": llama_like(
        "gpt_neox", num_key_value_heads="left out", rotary_pct=0.25, publish=with_config(rotary_pct=0.25), often=True
    ),
    "Falcon 7B": Architecture("falcon", FALCON | dict(multi_query=True), publish=(with_config(num_kv_heads=None),)),
    "Falcon 40B": Architecture("falcon", FALCON | dict(num_kv_heads=2, new_decoder_architecture=True), often=True),
    "Bloom": Architecture("bloom", BLOOM),
    "OLMo": llama_like("olmo"),
    "OLMo 2": llama_like("olmo2"),
    "OLMo 3": llama_like("olmo3", sliding_window=256),
    "Granite": llama_like("granite", tie_word_embeddings=True, **GRANITE_SCALES),
    "Granite 3 MoE": llama_like(
        "granitemoe", num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=True, often=True, budget="5bpw"
    ),
    "Granite 4": llama_like("granitemoehybrid", num_local_experts=0, num_experts_per_tok=0, publish=renamed_layers, **GRANITE4),
    "Granite 4 MoE": llama_like(
        "granitemoehybrid", num_local_experts=8, num_experts_per_tok=2, publish=renamed_layers, often=True, **GRANITE4
    ),
    "StableLM": llama_like("stablelm", partial_rotary_factor=0.25),
    "Command R": llama_like("cohere", logit_scale=0.0625),
    "Command R7B": llama_like("cohere2", logit_scale=0.25, sliding_window=256, head_dim=64, publish=with_config(rotary_pct=1.0)),
    "DeepSeek-V2": llama_like(
        "deepseek_v2", num_key_value_heads=4, first_k_dense_replace=1, head_dim=32, often=True, **ROUTED, **LATENT
    ),
    "DeepSeek-V3": llama_like(
        "deepseek_v3", num_key_value_heads=4, first_k_dense_replace=1, n_group=2, topk_group=1,
        publish=(with_tensors(glm_mtp), with_config(num_nextn_predict_layers=1)), **ROUTED, **LATENT,
    ),
    "GLM-4.7-Flash": llama_like(
        "glm4_moe_lite", num_key_value_heads=4, first_k_dense_replace=1, n_group=1, topk_group=1,
        publish=(with_tensors(glm_mtp), with_config(num_nextn_predict_layers=1)), **ROUTED, **LATENT,
    ),
    "MiMo-V2-Flash": llama_like(
        "mimo_v2_flash", num_key_value_heads=1, head_dim=64, v_head_dim=64, sliding_window=128, n_routed_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=256, publish=with_tensors(mimo_mtp),
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}
            for kind, theta in (("full_attention", 5e6), ("sliding_attention", 1e4))
        },
    ),
    "Mixtral": llama_like("mixtral", num_local_experts=8, num_experts_per_tok=2, often=True),
    "Qwen2 MoE": llama_like("qwen2_moe", shared_expert_intermediate_size=256, often=True, **MOE),
    "Qwen3 MoE": llama_like("qwen3_moe", head_dim=64, norm_topk_prob=True, **MOE),
    "OLMoE": llama_like("olmoe", num_key_value_heads=4, num_experts=8, num_experts_per_tok=2),
    "gpt-oss": llama_like(
        "gpt_oss", num_local_experts=8, num_experts_per_tok=2, head_dim=64, sliding_window=128, intermediate_size=256
    ),
    "DBRX": Architecture(
        "dbrx",
        dict(
            vocab_size=VOCABULARY, d_model=256, n_heads=4, n_layers=2, max_seq_len=1024,
            attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
            ffn_config=dict(ffn_hidden_size=256, moe_num_experts=8, moe_top_k=2),
        ),
        often=True,
    ),
    "GLM-4": llama_like("glm4", head_dim=64, partial_rotary_factor=0.5, attention_bias=True),
    "GLM-4.5": llama_like(
        "glm4_moe", head_dim=64, first_k_dense_replace=1, n_group=1, topk_group=1, use_qk_norm=True, attention_bias=True,
        partial_rotary_factor=0.5, publish=(with_tensors(glm_mtp), with_config(num_nextn_predict_layers=1)), often=True,
        **ROUTED,
    ),
    "SmolLM3": llama_like("smollm3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0], use_sliding_window=False),
    "Mamba": Architecture("mamba", SSM | dict(time_step_rank=16), often=True),
    "Falcon Mamba": Architecture("falcon_mamba", SSM | dict(time_step_rank=16, tie_word_embeddings=False)),
    "Mamba 2": Architecture(
        "mamba2", SSM | dict(head_dim=64, num_heads=8, n_groups=1, chunk_size=64, tie_word_embeddings=False)
    ),
    "Qwen3-Next": llama_like(
        "qwen3_next", num_hidden_layers=4, head_dim=64, shared_expert_intermediate_size=256, full_attention_interval=4,
        norm_topk_prob=True, partial_rotary_factor=0.25, publish=with_tensors(qwen_mtp), often=True, **MOE, **LINEAR,
    ),
    "Qwen3.5": llama_like(
        "qwen3_5_text", num_hidden_layers=4, head_dim=64, partial_rotary_factor=0.25, tie_word_embeddings=True,
        publish=(with_tensors(qwen_mtp), with_config(mtp_num_hidden_layers=1)), often=True, **LINEAR,
    ),
    "Bamba": llama_like("bamba", attn_layer_indices=[1], **MAMBA),
    "Jamba": llama_like(
        "jamba", num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
        expert_layer_offset=1, mamba_d_state=16, mamba_d_conv=4, mamba_expand=2, mamba_dt_rank=16, publish=vocabulary_model,
    ),
    "Falcon H1": llama_like("falcon_h1", head_dim=64, mamba_d_ssm=512, **MAMBA),
    "LFM2": llama_like(
        "lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, conv_L_cache=3, full_attn_idxs=[1]
    ),
    "LFM2 MoE": llama_like("lfm2_moe", layer_types=["conv", "full_attention"], num_dense_layers=1, conv_L_cache=3, **MOE),
    "EXAONE 4": llama_like("exaone4", sliding_window=256, sliding_window_pattern=4),
    "Nemotron": llama_like("nemotron", partial_rotary_factor=0.5, head_dim=64, publish=vocabulary_model),
    "ERNIE 4.5": llama_like("ernie4_5", tie_word_embeddings=True, head_dim=64, publish=vocabulary_model),
    "ERNIE 4.5 MoE": llama_like(
        "ernie4_5_moe", moe_num_experts=8, moe_k=2, moe_intermediate_size=256, moe_num_shared_experts=1,
        moe_layer_start_index=1, moe_layer_end_index=-1, moe_layer_interval=1, tie_word_embeddings=True,
        publish=vocabulary_model,
    ),
    "Hunyuan": llama_like("hunyuan_v1_dense", head_dim=64),
    "Hunyuan MoE": llama_like(
        "hunyuan_v1_moe", head_dim=64, num_experts=8, moe_topk=[2, 2], moe_intermediate_size=[512, 512],
        num_shared_expert=[1, 1],
    ),
    "Seed-OSS": llama_like("seed_oss", head_dim=64, attention_bias=True, attention_out_bias=False),
    "Arcee": llama_like("arcee", head_dim=64),
    "Apertus": llama_like("apertus", head_dim=64, max_position_embeddings=16384),
    "MiniCPM3": llama_like(
        "minicpm3", num_key_value_heads=4, scale_emb=12, scale_depth=1.4, dim_model_base=256, publish=vocabulary_model,
        **LATENT,
    ),
    "OPT": Architecture(
        "opt",
        dict(
            vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, ffn_dim=512,
            word_embed_proj_dim=256, max_position_embeddings=1024,
        ),
    ),
    "MPT": Architecture("mpt", dict(vocab_size=VOCABULARY, d_model=256, n_layers=2, n_heads=4, max_seq_len=1024)),
    "Phi-3.5 MoE": llama_like(
        "phimoe", num_local_experts=8, num_experts_per_tok=2, sliding_window=256, original_max_position_embeddings=1024,
        attention_bias=True, lm_head_bias=True, publish=vocabulary_model,
    ),
    "MiniMax-M2": llama_like("minimax_m2", head_dim=64, num_local_experts=8, num_experts_per_tok=2, intermediate_size=256),
    "Nemotron-H": llama_like(
        "nemotron_h", hybrid_override_pattern="M*-", num_hidden_layers=3, mamba_num_heads=8, mamba_head_dim=64,
        ssm_state_size=16, n_groups=1, expand=2, chunk_size=64, head_dim=64,
    ),
    "StableLM 2 12B": llama_like("stablelm", partial_rotary_factor=0.25, qk_layernorm=True, use_parallel_residual=True),
    "Llama 4": llama_like(
        "llama4_text", num_hidden_layers=4, head_dim=64, intermediate_size=256, intermediate_size_mlp=512,
        num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=2, attention_chunk_size=512,
    ),
    "Gemma 3, multimodal": multimodal(
        "gemma3", VISION, tokenizer="sentencepiece", often=True, whole=dict(mm_tokens_per_image=4) | IMAGES, **GEMMA
    ),
    "Gemma 4, multimodal": multimodal(
        "gemma4", dict(hidden_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=64),
        tokenizer="pieces", whole=dict(audio_config=None), head_dim=64, global_head_dim=128, num_hidden_layers=4,
        hidden_size_per_layer_input=64, vocab_size_per_layer_input=VOCABULARY, sliding_window=256, num_kv_shared_layers=0,
        layer_types=HYBRID_LAYERS, pad_token_id=0, agreement_nats=1e-4,
    ),
    "Mistral Small 3.1, multimodal": multimodal(
        "mistral3", VISION | dict(model_type="pixtral"), whole=dict(image_token_index=10, tie_word_embeddings=False),
        model_type="mistral", head_dim=64, tie_word_embeddings=False,
    ),
    "Ministral 3, multimodal in FP8": multimodal(
        "mistral3", VISION | dict(model_type="pixtral"), whole=dict(image_token_index=10, tie_word_embeddings=True),
        model_type="ministral3", head_dim=64, tie_word_embeddings=True, publish=partial(publish_in_fp8, block=None), often=True,
    ),
    "Qwen2.5-VL": multimodal(
        "qwen2_5_vl", QWEN_VISION | dict(fullatt_block_indexes=[1]), tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6},
    ),
    "Qwen3-VL": multimodal(
        "qwen3_vl", QWEN_VISION | dict(num_position_embeddings=16, deepstack_visual_indexes=[0, 1]), num_hidden_layers=4,
        head_dim=64, whole=dict(tie_word_embeddings=True), tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "default", "mrope_section": [12, 10, 10], "mrope_interleaved": True, "rope_theta": 5e6
        },
    ),
    "Qwen3.5, multimodal in FP8": multimodal(
        "qwen3_5", QWEN_VISION | dict(num_position_embeddings=16, deepstack_visual_indexes=[]), num_hidden_layers=4,
        head_dim=64, whole=dict(tie_word_embeddings=True), tie_word_embeddings=True, mtp_num_hidden_layers=1,
        rope_parameters={
            "rope_type": "default", "mrope_section": [3, 3, 2], "mrope_interleaved": True, "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
        },
        publish=(with_tensors(qwen_mtp), partial(publish_in_fp8, block=(128, 128))), **LINEAR,
    ),
    "Llama 4, multimodal": multimodal(
        "llama4",
        VISION | dict(vision_output_dim=256, projector_input_dim=256, projector_output_dim=256), num_hidden_layers=4,
        head_dim=64, intermediate_size=256, intermediate_size_mlp=512, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=2, attention_chunk_size=512,
    ),
    "gpt-oss in MXFP4": llama_like(
        "gpt_oss", num_local_experts=8, num_experts_per_tok=2, head_dim=64, sliding_window=128, intermediate_size=256,
        publish=publish_in_mxfp4, often=True, budget="4.8bpw", agreement_nats=1e-4,  # activations are rounded to 8 bits
    ),
    "Qwen3 MoE in FP8": llama_like(
        "qwen3_moe", head_dim=64, norm_topk_prob=True, publish=partial(publish_in_fp8, block=(128, 128)), **MOE
    ),
    "Llama in FP8 by compressed-tensors": llama_like("llama", publish=publish_in_compressed_fp8),
}  # fmt: skip

# Models that llama.cpp's converter does not support -> their class.
REFUSED = {"OPT": "OPTForCausalLM"}


def write_model(name: str, folder: Path) -> Path:
    """Make the model, and return its folder. The same name gives the same weights."""
    wanted = ARCHITECTURES[name]
    torch.manual_seed(1)
    config = AutoConfig.for_model(wanted.kind, **wanted.shape)
    has_vision = hasattr(config, "vision_config")
    model = (AutoModelForImageTextToText if has_vision else AutoModelForCausalLM).from_config(config).float().eval()
    _spread(model)
    model.save_pretrained(folder)
    tokenizer_of(wanted.tokenizer).save_pretrained(folder)
    if wanted.tokenizer == "sentencepiece":
        vocabulary_model(folder)
    for publish in wanted.publish:
        publish(folder)
    return folder


def _spread(model: torch.nn.Module) -> None:
    """Random weights whose columns differ in size, so that sensitivities do; biases that are not zero."""
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and not name.endswith("A_log") and "conv" not in name:
                scales = torch.exp(0.5 * torch.randn(parameter.shape[-1], generator=random)) * 0.04
                # BF16 as published, so that F16 rounds next to nothing
                parameter.copy_((torch.randn(parameter.shape, generator=random) * scales).bfloat16())
            elif name.endswith("bias") and "dt" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.02)
