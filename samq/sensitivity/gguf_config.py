"""What a GGUF says of its model, and transformers leaves out when it makes a configuration of the file.

Biases of attention and feed-forward layers, scaled and partial rotary embeddings, scales and windows of attention,
experts' widths. Without them the torch model is another model than the file. What is still missing then, the comparison
with llama.cpp finds (`samq.evaluation.agreement`).
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from samq.errors import SamqError
from samq.gguf.file import read_metadata, read_tensors, read_weights

ROPE_FREQS = "rope_freqs.weight"  # divisors of the rotary frequencies: Llama 3.1 and later
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"  # the same of LongRoPE: Phi-3

# Attribute of transformers' configurations -> key of the GGUF's metadata, after the architecture.
ATTRIBUTES = {
    "attention_multiplier": "attention.scale",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "embedding_multiplier": "embedding_scale",
    "final_logit_softcapping": "final_logit_softcapping",
    "head_dim": "attention.key_length",
    "logits_scaling": "logit_scale",
    "moe_intermediate_size": "expert_feed_forward_length",
    "residual_multiplier": "residual_scale",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "sliding_window": "attention.sliding_window",
}

# Attribute that gives layers biases -> the tensors that are such biases.
BIASES = {
    "attention_bias": re.compile(r"blk\.\d+\.attn_(q|k|v|output)\.bias"),
    "mlp_bias": re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.bias"),
}


def complete(config: PreTrainedConfig, path: Path) -> None:
    """Set what the file says and transformers left out of a configuration that it made of the file, in place.

    Attributes that the configuration's class does not have stay unknown.
    """
    metadata, tensors = read_metadata(path), read_tensors(path)
    prefix = f"{metadata['general.architecture']}."
    known = {key.removeprefix(prefix): value for key, value in metadata.items()}
    read: Any = GGUF_CONFIG_MAPPING.get(config.model_type, {})
    for attribute, key in ATTRIBUTES.items():
        if key in known and key not in read and hasattr(config, attribute):
            setattr(config, attribute, known[key])
    for attribute, pattern in BIASES.items():
        if hasattr(config, attribute) and any(map(pattern.fullmatch, tensors)):
            setattr(config, attribute, True)
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_theta" in rope:  # one kind of layer; gemma3 has two
        factors = {name: read_weights(path, name).tolist() for name in (LONG_FACTORS, SHORT_FACTORS) if name in tensors}
        rope |= _rope_parameters(config, known, factors)


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
    if ROPE_FREQS not in read_tensors(path):
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
