"""Checkpoints whose weights are published in FP8 or MXFP4: which ones load, and with which values.

llama.cpp's converter and torch must read the same numbers. For FP8 both multiply a weight by the scale of its block in float32
(`dequant_simple` in llama.cpp's conversion/base.py). transformers' own function divides the rows by the rows of scales
instead. So it fails or errs where blocks of 128 do not divide a matrix, as in DeepSeek-V3. For MXFP4 both are exact.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.core_model_loading import WeightRenaming
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

# Our names in transformers' list of methods
_OUR_FP8 = "fp8_of_llama_cpp"
_OUR_MXFP4 = "mxfp4_as_floats"
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` of a config.json, at its top or in the text model's part; None if there is none."""
    text = config.get("text_config") or {}
    return config.get("quantization_config") or text.get("quantization_config") or None


def refused_method(config: Mapping[str, Any]) -> str | None:
    """The quantization method of a config.json if SAMQ cannot load its weights; None if it can, or there is none."""
    quantization = quantization_of(config)
    if quantization is None:
        return None
    method = str(quantization.get("quant_method", "unknown method"))
    known = {
        "fp8": True,
        "mxfp4": config.get("model_type") == "gpt_oss",  # what llama.cpp's converter keeps as it is
        "compressed-tensors": _is_compressed_fp8(quantization),
    }
    return None if known.get(method) else method


def _is_compressed_fp8(quantization: Mapping[str, Any]) -> bool:
    """Whether these are FP8 weights with scales of rows or of blocks, all alike: what llama.cpp's converter reads."""
    groups = list((quantization.get("config_groups") or {}).values())
    weights = (groups[0].get("weights") or {}) if len(groups) == 1 else {}
    return (
        quantization.get("format") in ("float-quantized", "naive-quantized")
        and (weights.get("type"), weights.get("num_bits")) == ("float", 8)
        and weights.get("strategy") in ("channel", "block")
        and weights.get("group_size") is None
    )


def dequantize_at_load(config: PreTrainedConfig) -> None:
    """Have transformers load plain floats: change the configuration of a checkpoint that `refused_method` lets pass."""
    quantization = quantization_of(config.to_dict())
    if quantization is None:
        return
    if quantization["quant_method"] == "mxfp4":
        ours = {"quant_method": _OUR_MXFP4, "dequantize": True}
    else:
        block, suffix = quantization.get("weight_block_size"), "_scale_inv"
        if quantization["quant_method"] == "compressed-tensors":
            (group,) = quantization["config_groups"].values()
            block, suffix = group["weights"].get("block_structure"), "_scale"
        ours = {"quant_method": _OUR_FP8, "weight_block_size": block, "scale_suffix": suffix, "dequantize": True}
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        part.quantization_config = ours  # some classes load with the text model's part alone


def dequantize_fp8(weight: torch.Tensor, scale: torch.Tensor, block: Sequence[int] | None) -> torch.Tensor:
    """FP8 weights as float32, as llama.cpp's converter computes them.

    Args:
        weight: (..., rows, row length) in FP8.
        scale: one number, one for each row, or with `block` one for each block of (block[0], block[1]) weights. The last
            block of a row or column may be cut.
    """
    scale = scale.float()
    if block is not None:
        first = scale.ndim - len(block)
        for dimension, size in enumerate(block, first):
            scale = scale.repeat_interleave(size, dimension)
        scale = scale[tuple(slice(0, extent) for extent in weight.shape)]
    while scale.ndim < weight.ndim:
        scale = scale.unsqueeze(-1)
    return weight.float() * scale


class _Dequantize(Fp8Dequantize):
    """transformers' step from FP8 to floats, with the converter's values."""

    def _dequantize_one(
        self, quantized: torch.Tensor, scales: torch.Tensor, output_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        if quantized.dtype not in _FP8:
            return super()._dequantize_one(quantized, scales, output_dtype)
        block = self.hf_quantizer.quantization_config.weight_block_size
        return dequantize_fp8(quantized, scales, block).to(output_dtype or torch.float32)

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        full_layer_name: str | None = None,
        model: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What is not in FP8 gets the model's type here, since transformers leaves it in the file's."""
        converted: dict[str, Any] = super().convert(input_dict, full_layer_name, model, **kwargs)
        dtype = self._get_target_dtype(model, full_layer_name)
        if dtype is None:
            return converted
        return {
            name: [tensor.to(dtype) for tensor in tensors] if isinstance(tensors, list) else tensors.to(dtype)
            for name, tensors in converted.items()
        }


@register_quantization_config(_OUR_FP8)
class _Fp8Config(FineGrainedFP8Config):
    """Where the scales are, and of which blocks."""

    def __init__(self, scale_suffix: str = "_scale_inv", **kwargs: Any):
        super().__init__(**kwargs)
        self.scale_suffix = scale_suffix


@register_quantizer(_OUR_FP8)
class _Fp8Quantizer(FineGrainedFP8HfQuantizer):
    """transformers' loading of FP8, with `_Dequantize` and the checkpoint's names of scales."""

    serialized_names = {  # noqa: RUF012 (as in transformers)
        "weight": ["weight", "weight_scale_inv", "activation_scale"],
        "gate_up_proj": ["gate_up_proj", "gate_up_proj_scale_inv"],
        "down_proj": ["down_proj", "down_proj_scale_inv"],
    }

    def get_load_operations(self) -> dict[str, type]:
        """The step that makes floats."""
        return {"dequantize": _Dequantize}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Without transformers' guess that every name ending in `.scale` is a scale of FP8."""
        assert isinstance(self.quantization_config, _Fp8Config)
        suffix = self.quantization_config.scale_suffix
        renamed = [] if suffix == "_scale_inv" else [WeightRenaming(rf"\.weight{suffix}$", ".weight_scale_inv")]
        conversions: list[Any] = HfQuantizer.update_weight_conversions(self, weight_conversions, model)
        return renamed + conversions


@register_quantization_config(_OUR_MXFP4)
class _Mxfp4Config(Mxfp4Config):
    """MXFP4 that becomes floats."""

    def __init__(self, **kwargs: Any):
        kwargs.pop("quant_method", None)
        super().__init__(**kwargs)
        self.quant_method = _OUR_MXFP4  # type: ignore[assignment]


@register_quantizer(_OUR_MXFP4)
class _Mxfp4Quantizer(Mxfp4HfQuantizer):
    """transformers' loading of MXFP4 without its warning that kernels are missing: floats need none."""

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        return
