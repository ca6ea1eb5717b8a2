"""Where GGUF keeps the weights that torch holds: names, fused tensors, and the order of rows."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import ReaderTensor, dequantize
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from samq.errors import SamqError
from samq.gguf.file import open_gguf, read_metadata, read_tensors
from samq.progress import Progress, silent

logger = logging.getLogger(__name__)

# The widest rounding between two full-precision copies of a weight: BF16 keeps 8 bits, F16 nothing under 2^-25.
RELATIVE_ROUNDING = 2.0**-7
ABSOLUTE_ROUNDING = 2.0**-24


@dataclass(frozen=True)
class Weight:
    """A weight matrix, or a stack of experts' matrices, of a torch model.

    `view` takes the parameter, or anything of its shape such as a gradient, to GGUF's shape: (rows, row length),
    experts first when stacked. Rows stay in torch's order; `row_orders` says what GGUF makes of it.
    """

    name: str
    parameter: nn.Parameter
    view: Callable[[torch.Tensor], torch.Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, row length), experts first when stacked."""
        return tuple(self.view(self.parameter.detach()).shape)


def weights_of(model: PreTrainedModel, names: Callable[[str], str | None]) -> list[Weight]:
    """Every weight matrix of the model that GGUF has a name for, in the model's order, tied weights once.

    `names` maps torch's parameter names to GGUF's (`samq.gguf.file.gguf_names`). Vectors are left out: they are never
    quantized. Raises SamqError if two parameters claim one GGUF tensor, or if none has a name.
    """
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    found: dict[str, Weight] = {}
    for hf_name, parameter in model.named_parameters():  # a tied weight comes once, under the embedding's name
        if parameter.ndim not in (2, 3):
            continue
        for name, view in _gguf_views(hf_name, names).items():
            if parameter.ndim == 3 and "_exps." not in name:
                continue  # a convolution: llama.cpp never quantizes those
            if name in found:
                raise SamqError(
                    f"{hf_name} is one of several parameters that make up {name}: this layout of weights is not "
                    "supported; use a model whose experts are stacked in one parameter"
                )
            found[name] = Weight(name, parameter, torch.t if id(parameter) in transposed else view)
    if not found:
        raise SamqError(
            f"no weight of {type(model).__name__} has a GGUF name; check that the GGUF was converted from this model"
        )
    return list(found.values())


def _gguf_views(hf_name: str, names: Callable[[str], str | None]) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """GGUF name -> view, for the one tensor, or the two, that GGUF makes of a parameter."""
    if hf_name.endswith("experts.gate_up_proj"):  # transformers stacks both halves on the rows, llama.cpp parts them
        stem = hf_name.removesuffix("gate_up_proj")
        halves = {names(f"{stem}gate_proj"): 0, names(f"{stem}up_proj"): 1}
        if None not in halves:
            return {_tensor(str(name)): _half(index) for name, index in halves.items()}
    name = names(hf_name)
    if name is None:
        logger.warning("%s has no GGUF name and is not measured", hf_name)
        return {}
    return {_tensor(name): lambda tensor: tensor}


def _tensor(name: str) -> str:
    """GGUF's tensor name; stacked experts have no `.weight` in torch."""
    return name if name.endswith(".weight") else f"{name}.weight"


def _half(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.chunk(2, dim=-2)[index]


def rotary_row_order(rows: int, heads: int) -> np.ndarray:
    """GGUF row -> torch row where llama.cpp's converter interleaved the two halves of every rotary head.

    Source: `LlamaModel.permute` in llama.cpp's conversion/llama.py.
    """
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def row_orders(weights: list[Weight], gguf: Path, progress: Progress = silent) -> dict[str, np.ndarray]:
    """The order of each weight's rows in a full-precision GGUF of the same model; weights in torch's order are absent.

    `order[i]` is the torch row that GGUF has as row i. Found by comparing every weight, up to rounding, so a tensor
    laid out in a way that is not known, or a GGUF of another model, raises SamqError: never a silent mistake.
    """
    stored, rotated = stored_tensors(weights, gguf), _rotary_heads(read_metadata(gguf))
    orders = {}
    for done, weight in enumerate(weights):
        progress(done, len(weights))
        ours = weight.view(weight.parameter.detach()).to("cpu", torch.float32).numpy()
        theirs = _read(gguf, stored[weight.name])
        if _same(ours, theirs):
            continue
        heads = rotated.get(weight.name.rpartition("attn_")[2])
        order = rotary_row_order(len(ours), heads) if heads and len(ours) % (2 * heads) == 0 else None
        if order is None or not _same(ours[order], theirs):
            raise SamqError(
                f"{weight.name} in {gguf} is not torch's weight, in any known order of rows; convert the GGUF from "
                "this model"
            )
        orders[weight.name] = order
    progress(len(weights), len(weights))
    return orders


def stored_tensors(weights: list[Weight], gguf: Path) -> dict[str, ReaderTensor]:
    """GGUF's name -> the tensor there, of every weight; raises SamqError if one is missing or has another shape."""
    stored = {tensor.name: tensor for tensor in open_gguf(gguf).tensors}
    shapes = {name: tensor.shape for name, tensor in read_tensors(gguf).items()}
    for weight in weights:
        if shapes.get(weight.name) != weight.shape:
            raise SamqError(
                f"{weight.name} is {weight.shape} in torch, but {gguf} has {shapes.get(weight.name, 'no such tensor')}; "
                "make the GGUF from this model"
            )
    return {weight.name: stored[weight.name] for weight in weights}


def _read(gguf: Path, tensor: ReaderTensor) -> np.ndarray:
    """A tensor in float32, not through the memory map: its pages would stay with the process beside the model."""
    stored = np.fromfile(gguf, tensor.data.dtype, tensor.data.size, offset=tensor.data_offset)
    weights = dequantize(stored.reshape(tensor.data.shape), tensor.tensor_type)
    return weights.reshape(tuple(reversed(tensor.shape)))


def _rotary_heads(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Heads of the rotated projections, where the file has one number for all layers."""
    prefix = f"{metadata['general.architecture']}.attention."
    heads = metadata.get(f"{prefix}head_count", 0)
    return {"q.weight": heads, "k.weight": metadata.get(f"{prefix}head_count_kv", heads)}


def _same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return np.allclose(ours, theirs, rtol=RELATIVE_ROUNDING, atol=ABSOLUTE_ROUNDING)
