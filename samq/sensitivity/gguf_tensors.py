"""Tensors of a GGUF that transformers reads into the wrong place or shape: its processors, mended.

transformers looks its processors up by architecture. `register_processors` puts these in the place of its own.
"""

import re
import struct
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import modeling_gguf_pytorch_utils as reading
from transformers.integrations.gguf import reader

Weights = NDArray[np.float32]

_PER_HEAD = re.compile(r"model\.layers\.(\d+)\.self_attn\.([qk])_layernorm\.norms\.0\.weight")


class Qwen2Moe(reading.Qwen2MoeTensorProcessor):
    """The shared expert's gate is a matrix of one row in llama.cpp's own files, and a vector in those quantized."""

    def process(self, weights: Weights, name: str, **options: Any) -> Any:
        """See transformers' TensorProcessor."""
        return super().process(weights.ravel() if "ffn_gate_inp_shexp" in name else weights, name, **options)


class Llama(reading.LlamaTensorProcessor):
    """Mixtral's file is a Llama's with stacked experts, which transformers puts in place for Qwen's mixtures only."""

    def perform_fallback_tensor_mapping(
        self, gguf_to_hf_name_map: dict[str, str], suffix: str, qual_name: str, hf_name: str
    ) -> None:
        """See transformers' TensorProcessor."""
        experts = reading.Qwen2MoeTensorProcessor(self.config)
        experts.perform_fallback_tensor_mapping(gguf_to_hf_name_map, suffix, qual_name, hf_name)

    def process(self, weights: Weights, name: str, **options: Any) -> Any:
        """See transformers' TensorProcessor."""
        experts: Any = reading.Qwen2MoeTensorProcessor(self.config)
        process = experts.process if "_exps." in name else super().process
        return process(weights, name, **options)


class Gemma4(reading.TensorProcessor):
    """The scale of a layer's output is a buffer in torch, and so is called without `.weight`."""

    def process(self, weights: Weights, name: str, **options: Any) -> Any:
        """See transformers' TensorProcessor."""
        own = name.removesuffix(".weight") if "layer_output_scale" in name else name
        return reading.GGUFTensor(weights, own, {})


class Falcon(reading.TensorProcessor):
    """Queries, key and value of each group of heads follow one another in torch; GGUF has all queries first."""

    def process(self, weights: Weights, name: str, **options: Any) -> Any:
        """See transformers' TensorProcessor."""
        if "attn_qkv" in name:
            groups = self.config["num_key_value_heads"]
            width = self.config["hidden_size"] // self.config["num_attention_heads"]
            parts = np.split(weights, [len(weights) - 2 * groups * width, len(weights) - groups * width])
            parts = [part.reshape(groups, -1, *weights.shape[1:]) for part in parts]
            weights = np.concatenate(parts, axis=1).reshape(weights.shape)
        return reading.GGUFTensor(weights, name, {})


class StableLm(reading.TensorProcessor):
    """Each head has a norm of its own in torch; GGUF stacks them (StableLM 2 12B)."""

    def perform_fallback_tensor_mapping(
        self, gguf_to_hf_name_map: dict[str, str], suffix: str, qual_name: str, hf_name: str
    ) -> None:
        """See transformers' TensorProcessor."""
        if norm := _PER_HEAD.fullmatch(hf_name):
            gguf_to_hf_name_map[f"blk.{norm[1]}.attn_{norm[2]}_norm.weight"] = qual_name + hf_name

    def process(self, weights: Weights, name: str, **options: Any) -> Any:
        """See transformers' TensorProcessor."""
        first = options["tensor_key_mapping"].get(name, "") if weights.ndim == 2 else ""
        if not _PER_HEAD.search(first):
            return reading.GGUFTensor(weights, name, {})
        for head, norm in enumerate(weights):
            own = first.replace(".norms.0.", f".norms.{head}.")
            options["parsed_parameters"]["tensors"][own] = torch.from_numpy(norm.copy())
        return reading.GGUFTensor(weights, "", {})  # all of it has its place already


def _knowing_mixtral(weights_map: Callable[..., dict[str, str]]) -> Callable[..., dict[str, str]]:
    @wraps(weights_map)
    def of_architecture(model: Any, processor: Any, model_type: str | None = None, *more: Any, **named: Any) -> Any:
        if model_type is None and model.config.model_type == "mixtral":  # a module of it has no configuration
            model_type = "llama"
        return weights_map(model, processor, model_type, *more, **named)

    return of_architecture


def _read_string(blob: Any, pos: int) -> tuple[str, int]:
    """transformers' own, but for bytes that are not UTF-8: they become U+FFFD, as in `samq.gguf.header`."""
    (length,) = struct.unpack_from("<Q", blob, pos)
    end = pos + 8 + length
    return bytes(blob[pos + 8 : end]).decode(errors="replace"), end


def register_processors() -> None:
    """Let transformers use these processors, Llama's names for Mixtral, and a name of the model that is not UTF-8."""
    processors = {"falcon": Falcon, "gemma4": Gemma4, "llama": Llama, "qwen2moe": Qwen2Moe, "stablelm": StableLm}
    reading.TENSOR_PROCESSORS |= processors
    reader._read_string = _read_string
    reading.get_gguf_hf_weights_map = _knowing_mixtral(reading.get_gguf_hf_weights_map)
