"""What a GGUF says of its model, and transformers leaves out when it makes a configuration of the file.

Biases of attention and feed-forward layers, scaled and partial rotary embeddings, scales and windows of attention,
experts' widths. Without them the torch model is another model than the file. What is still missing then, the comparison
with llama.cpp finds (`samq.evaluation.agreement`).
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from samq.errors import SamqError
from samq.gguf.file import open_gguf, read_metadata, read_tensors, read_weights
from samq.sensitivity import gguf_tensors

ROPE_FREQS = "rope_freqs.weight"  # divisors of the rotary frequencies: Llama 3.1 and later
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"  # the same of LongRoPE: Phi-3

# Whether a layer attends to a window only -> transformers' name
KINDS = {True: "sliding_attention", False: "full_attention"}

# Attribute of transformers' configurations -> key of the GGUF's metadata, after the architecture.
ATTRIBUTES = {
    "attention_multiplier": "attention.scale",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "embedding_multiplier": "embedding_scale",
    "final_logit_softcapping": "final_logit_softcapping",
    "head_dim": "attention.key_length",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
    "logits_scaling": "logit_scale",
    "moe_intermediate_size": "expert_feed_forward_length",
    "norm_eps": "attention.layer_norm_epsilon",
    "norm_epsilon": "attention.layer_norm_epsilon",
    "residual_multiplier": "residual_scale",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "sliding_window": "attention.sliding_window",
}

# Attribute that gives layers biases -> the tensors that are such biases.
BIASES = {
    "attention_bias": re.compile(r"blk\.\d+\.attn_(q|k|v|output)\.bias"),
    "mlp_bias": re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.bias"),
}

gguf_tensors.register_processors()


def completed_from_gguf(config: PreTrainedConfig, path: Path) -> PreTrainedConfig:
    """The configuration that transformers made of the file, with what the file says and transformers left out.

    Attributes that the configuration's class does not have stay unknown.
    """
    known, tensors = _known(path), read_tensors(path)
    if config.model_type == "gemma4_text":
        _gemma4(config, known, tensors)
        return config
    if config.model_type == "llama" and "expert_count" in known:
        config = _mixtral(config, known)
    read: Any = GGUF_CONFIG_MAPPING.get(config.model_type, {})
    for attribute, key in ATTRIBUTES.items():
        if key in known and key not in read and hasattr(config, attribute):
            setattr(config, attribute, known[key])
    for attribute, pattern in BIASES.items():
        if hasattr(config, attribute) and any(map(pattern.fullmatch, tensors)):
            setattr(config, attribute, True)
    if special := SPECIAL.get(config.model_type):
        for attribute, value in special(config, known, tensors).items():
            setattr(config, attribute, value)
    if (config.pad_token_id or 0) >= config.vocab_size:  # the published model's, where the file names none
        config.pad_token_id = None
    rope = getattr(config, "rope_parameters", None)
    factors = {name: read_weights(path, name).tolist() for name in (LONG_FACTORS, SHORT_FACTORS) if name in tensors}
    if isinstance(rope, dict) and "rope_theta" in rope:
        rope |= _rope_parameters(config, known, factors)
        if "original_max_position_embeddings" in rope and hasattr(config, "original_max_position_embeddings"):
            config.original_max_position_embeddings = rope["original_max_position_embeddings"]  # it replaces rope's
    elif isinstance(rope, dict) and "full_attention" in rope:  # two kinds of layers, of which one has windows
        rope["full_attention"] |= _rope_parameters(config, known, factors)
        rope["sliding_attention"]["rope_theta"] = known.get("rope.freq_base_swa", 10_000.0)
    return config


def _known(path: Path) -> dict[str, Any]:
    """The metadata of the file's architecture, by the key after its name; with the lists, one value a layer."""
    architecture = read_metadata(path)["general.architecture"]
    fields = open_gguf(path).fields
    return {
        key.removeprefix(f"{architecture}."): field.contents()
        for key, field in fields.items()
        if key.startswith(f"{architecture}.")
    }


def _mixtral(config: PreTrainedConfig, known: Mapping[str, Any]) -> MixtralConfig:
    """A Llama of experts, which llama.cpp has no name of its own for."""
    shared = {name: value for name, value in config.to_dict().items() if hasattr(MixtralConfig, name)}
    own = {"num_local_experts": known["expert_count"], "num_experts_per_tok": known["expert_used_count"]}
    return MixtralConfig(**(shared | own | {"model_type": "mixtral"}))


def _attention_scale(config: Any, largest: int) -> int:
    """What Gemma scales attention by, which a file does not say: llama.cpp knows the 27B by its number of layers."""
    of_head: int = config.hidden_size // config.num_attention_heads
    return of_head if config.num_hidden_layers == largest else config.head_dim


def _gemma2(config: Any, known: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {"query_pre_attn_scalar": _attention_scale(config, largest=46)}


def _gemma3(config: Any, known: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    scale = {"query_pre_attn_scalar": _attention_scale(config, largest=62)}
    return scale | _windows(known, config.num_hidden_layers)


def _windows(known: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Which layers attend to a window only, if the file says so: for each layer, or every how many layers one does not."""
    pattern = known.get("attention.sliding_window_pattern")
    if isinstance(pattern, int):
        pattern = [(layer + 1) % pattern for layer in range(layers)]
    return {"layer_types": [KINDS[bool(windowed)] for windowed in pattern]} if pattern else {}


def _falcon(config: Any, known: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    groups = known.get("attention.head_count_kv", 1)
    return {
        "num_kv_heads": groups,
        "multi_query": groups == 1,
        "new_decoder_architecture": groups > 1,
        "num_ln_in_parallel_attn": (2 if "blk.0.attn_norm_2.weight" in tensors else 1) if groups > 1 else None,
        "ffn_hidden_size": known["feed_forward_length"],
        "parallel_attn": True,
        "alibi": False,
        "bias": "blk.0.attn_qkv.bias" in tensors,
    }


def _stablelm(config: Any, known: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {"qk_layernorm": "blk.0.attn_q_norm.weight" in tensors}


# Model type -> attributes that follow from more than one key, or from the tensors
SPECIAL: Mapping[str, Callable[[Any, Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]] = {
    "falcon": _falcon,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "stablelm": _stablelm,
}


def _gemma4(config: Any, known: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Make the configuration again, since attributes of single layers follow from others when it is made."""
    layers, heads = known["block_count"], known["attention.head_count_kv"]
    widths = known["feed_forward_length"]
    kinds = _windows(known, layers)["layer_types"]
    full = kinds.index(KINDS[False])
    heads, widths = (value if isinstance(value, list) else [value] * layers for value in (heads, widths))
    config.__init__(
        vocab_size=config.vocab_size,
        vocab_size_per_layer_input=config.vocab_size,
        hidden_size=known["embedding_length"],
        hidden_size_per_layer_input=known["embedding_length_per_layer_input"],
        intermediate_size=widths[0],
        use_double_wide_mlp=widths[-1] != widths[0],
        num_hidden_layers=layers,
        num_attention_heads=known["attention.head_count"],
        num_key_value_heads=heads[kinds.index(KINDS[True])],
        num_global_key_value_heads=heads[full],
        attention_k_eq_v=f"blk.{full}.attn_v.weight" not in tensors,
        num_kv_shared_layers=known["attention.shared_kv_layers"],
        head_dim=known["attention.key_length_swa"],
        global_head_dim=known["attention.key_length"],
        layer_types=kinds,
        sliding_window=known["attention.sliding_window"],
        max_position_embeddings=known["context_length"],
        rms_norm_eps=known["attention.layer_norm_rms_epsilon"],
        final_logit_softcapping=known.get("final_logit_softcapping"),
        enable_moe_block="expert_count" in known,
        num_experts=known.get("expert_count"),
        top_k_experts=known.get("expert_used_count"),
        moe_intermediate_size=known.get("expert_feed_forward_length"),
        rope_parameters={
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": known["rope.freq_base"],
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": known["rope.freq_base_swa"]},
        },
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


def _rope_parameters(
    config: PreTrainedConfig, known: Mapping[str, Any], factors: Mapping[str, list[float]]
) -> dict[str, Any]:
    """Type and factors of the rotary embeddings; empty if they are the plain ones.

    llama.cpp takes a file that has a factor and no type as linear (llama-model.cpp, `load_hparams`).
    """
    rope: dict[str, Any] = {}
    head = known.get("attention.key_length", config.hidden_size // config.num_attention_heads)
    if (rotated := known.get("rope.dimension_count", head)) != head:
        rope["partial_rotary_factor"] = rotated / head
    original = known.get("rope.scaling.original_context_length", known.get("context_length"))
    attention = known.get("rope.scaling.attn_factor", 1.0)
    if len(factors) == 2:
        return rope | {
            "rope_type": "longrope",
            "long_factor": factors[LONG_FACTORS],
            "short_factor": factors[SHORT_FACTORS],
            "original_max_position_embeddings": original,
            "attention_factor": attention,
        }
    factor = known.get("rope.scaling.factor", known.get("rope.scale_linear", 0.0))
    kind = known.get("rope.scaling.type", "linear") if factor else "none"
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        lengthened = (
            1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
        )  # queries and keys, as llama-context.cpp has it
        return rope | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": lengthened * attention,
            "beta_fast": known.get("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": known.get("rope.scaling.yarn_beta_slow", 1.0),
        }
    return rope


def scale_frequencies(model: PreTrainedModel, path: Path) -> None:
    """Divide the model's rotary frequencies by the file's `rope_freqs`, if it has them.

    Raises SamqError if the model has no embedding of so many frequencies.
    """
    if ROPE_FREQS not in read_tensors(path) or model.config.model_type == "gemma4_text":  # Gemma 4 knows its own
        return
    divisors = torch.tensor(read_weights(path, ROPE_FREQS))
    embeddings = [module for module in model.modules() if len(getattr(module, "inv_freq", ())) == len(divisors)]
    if not embeddings:
        raise SamqError(
            f"{path} scales {len(divisors)} rotary frequencies, and {type(model).__name__} has no embedding of so many; give "
            "the folder that the file was made from instead"
        )
    for embedding in embeddings:
        for name in ("inv_freq", "original_inv_freq"):
            if hasattr(embedding, name):
                frequencies = getattr(embedding, name)
                setattr(embedding, name, frequencies / divisors.to(frequencies.device))
