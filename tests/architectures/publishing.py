"""Changes that make the folder of a tiny model what people publish."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.architectures.vocabularies import sentencepiece_model


def with_config(**changes: Any) -> Callable[[Path], None]:
    """Set entries of config.json, or leave out those that are None."""

    def publish(folder: Path) -> None:
        path = folder / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))

    return publish


def renamed_layers(folder: Path) -> None:
    """Granite 4's names of the kinds of layers."""
    path = folder / "config.json"
    text = path.read_text().replace('"linear_attention"', '"mamba"').replace('"full_attention"', '"attention"')
    path.write_text(text)


def with_tensors(make: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    """Add tensors to the weights."""

    def publish(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = load_file(path)
        save_file(weights | make(weights), path, metadata={"format": "pt"})

    return publish


def copied_output(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A tied model whose file holds the output as well."""
    return {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}


def layer_as(weights: dict[str, torch.Tensor], layer: int, prefix: str) -> dict[str, torch.Tensor]:
    """Copies of a layer's weights under another name."""
    matches = {name: re.match(rf"model\.(?:language_model\.)?layers\.{layer}\.(.*)", name) for name in weights}
    return {f"{prefix}{match[1]}": weights[name].clone() for name, match in matches.items() if match}


def qwen_mtp(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Qwen3-Next's and Qwen3.5's layer for multi-token prediction."""
    width = next(weight.shape[1] for name, weight in weights.items() if name.endswith("embed_tokens.weight"))
    norms = {
        f"mtp.{name}.weight": torch.zeros(width) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    }
    return layer_as(weights, 3, "mtp.layers.0.") | {"mtp.fc.weight": torch.randn(width, 2 * width) * 0.03} | norms


def glm_mtp(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """GLM's and DeepSeek-V3's layer for multi-token prediction."""
    width = weights["model.embed_tokens.weight"].shape[1]
    norms = {f"model.layers.2.{name}.weight": torch.ones(width) for name in ("enorm", "hnorm", "shared_head.norm")}
    return (
        layer_as(weights, 1, "model.layers.2.")
        | norms
        | {
            "model.layers.2.eh_proj.weight": torch.randn(width, 2 * width) * 0.03,
            "model.layers.2.shared_head.head.weight": weights["lm_head.weight"].clone(),
            "model.layers.2.embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
        }
    )


def mimo_mtp(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """MiMo-V2-Flash's three layers for multi-token prediction: attention with a window, and a dense feed-forward layer."""
    width = weights["model.embed_tokens.weight"].shape[1]
    norms = [f"{name}.weight" for name in ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm")]
    layers = {}
    for prefix in (f"model.mtp.layers.{layer}." for layer in range(3)):
        attention = {name: weight for name, weight in layer_as(weights, 1, prefix).items() if ".self_attn." in name}
        dense = {name: weight for name, weight in layer_as(weights, 0, prefix).items() if ".mlp." in name}
        layers |= attention | dense | {f"{prefix}{name}": torch.ones(width) for name in norms}
        layers[f"{prefix}eh_proj.weight"] = torch.randn(width, 2 * width) * 0.03
    return layers


def gemma_3n(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gemma 3n's scales as trained, and what transformers leaves out: keys and values of layers that use those of others."""
    scales = {name: torch.ones_like(scale) for name, scale in weights.items() if name.endswith("correct_output_scale")}
    norms = {  # which divide by the root of the head's width, since attention does not
        name: torch.full_like(norm, len(norm) ** -0.25)
        for name, norm in weights.items()
        if re.search(r"[qk]_norm", name)
    }
    whole = weights | scales | norms
    unused = layer_as(whole, 18, "model.layers.20.") | layer_as(whole, 19, "model.layers.21.")
    return (
        scales | norms | {name: weight for name, weight in unused.items() if re.search(r"\.[kv]_(proj|norm)\.", name)}
    )


def vocabulary_model(folder: Path) -> None:
    """SentencePiece's file, which some converters ask for beside tokenizer.json."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
