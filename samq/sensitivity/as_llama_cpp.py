"""A torch model, changed where llama.cpp computes something else on purpose or by a fault of its own.

Files are made for llama.cpp, so sensitivities have to be those of what llama.cpp computes. Each entry was found by comparing
logits in float32 and holds to 1e-12 nats. `samq.evaluation.agreement` compares every model, so an entry that a later llama.cpp
no longer needs is refused there.
"""

from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# Attend to a window only in transformers, and to all tokens before in llama.cpp
WITHOUT_WINDOWS = frozenset(
    ("mistral", "mixtral", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "starcoder2")
)


def compute_as_llama_cpp(model: PreTrainedModel) -> None:
    """Change, in place, what the model computes."""
    kind = model.config.get_text_config().model_type
    if kind in WITHOUT_WINDOWS:
        _without_windows(model)
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            _round_yarn(module)
    if kind == "phimoe":
        _plain_phimoe(model)
    elif kind == "gemma3n_text":
        _sparse_by_sample_deviation(model)


def _without_windows(model: PreTrainedModel) -> None:
    config: Any = model.config.get_text_config()
    if getattr(config, "layer_types", None):  # a kind a layer: some models make a mask of each kind, used or not
        config.layer_types = ["full_attention"] * len(config.layer_types)
    else:
        config.sliding_window = None
    modules: Any = model.modules()
    for module in modules:
        if hasattr(module, "sliding_window"):
            module.sliding_window = None


def _round_yarn(embedding: Any) -> None:
    """Round the bounds of YaRN's ramp, which gpt-oss leaves as they are (`ggml_rope_yarn_corr_dims` in ggml.c)."""
    rope = getattr(embedding.config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "yarn" or rope.get("truncate", True):
        return
    rope["truncate"] = True
    frequencies, _ = ROPE_INIT_FUNCTIONS["yarn"](embedding.config, embedding.inv_freq.device)
    for name in ("inv_freq", "original_inv_freq"):
        setattr(embedding, name, frequencies.clone())


def _plain_phimoe(model: PreTrainedModel) -> None:
    """Phi-3.5-MoE as llama.cpp has it: norms without the mean, and two experts by plain softmax (models/phi3.cpp)."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            _replace_forward(module, _rms_norm)
        elif type(module).__name__ == "PhimoeTopKRouter":
            _replace_forward(module, _route)


def _sparse_by_sample_deviation(model: PreTrainedModel) -> None:
    """Gemma 3n's cutoff of sparse layers, with the deviation of a sample (`gaussian_topk` in models/gemma3n.cpp)."""
    modules: Any = model.modules()
    for module in modules:
        if getattr(module, "activation_sparsity", 0) > 0:
            module._gaussian_topk = MethodType(_above_cutoff, module)


def _above_cutoff(layer: Any, values: torch.Tensor) -> torch.Tensor:
    deviations = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(layer.activation_sparsity)).item()
    cutoff = values.mean(-1, keepdim=True) + values.std(-1, keepdim=True) * deviations
    return nn.functional.relu(values - cutoff)


def _replace_forward(module: nn.Module, forward: Any) -> None:
    """On several GPUs accelerate has wrapped the method already, and calls the old one by another name."""
    setattr(module, "_old_forward" if hasattr(module, "_old_forward") else "forward", MethodType(forward, module))


def _rms_norm(norm: Any, values: torch.Tensor) -> torch.Tensor:
    normed: torch.Tensor = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + norm.eps)
    return torch.addcmul(norm.bias, normed, norm.weight)


def _route(router: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = nn.functional.linear(hidden, router.weight)
    weights, experts = torch.softmax(logits, dim=-1).topk(router.top_k, dim=-1)
    return logits, weights / weights.sum(-1, keepdim=True), experts
