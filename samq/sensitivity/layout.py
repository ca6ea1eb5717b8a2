"""How a GGUF stores the weights of a torch model: names, fused tensors, and the order of rows."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import ReaderTensor, dequantize
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from samq.errors import SamqError
from samq.gguf.file import mostly_unknown, open_gguf, read_metadata, read_tensors
from samq.progress import Progress, silent

logger = logging.getLogger(__name__)

# The largest rounding error between two full-precision copies of a weight: BF16 has 8 bits, F16 nothing below 2^-25.
RELATIVE_ROUNDING = 2.0**-7
ABSOLUTE_ROUNDING = 2.0**-24

_ANOTHER_MODEL = "either the GGUF is of another model, or SAMQ does not know how this architecture is stored"


@dataclass(frozen=True)
class Weight:
    """A weight matrix, or a stack of experts' matrices, of a torch model.

    `view` converts the parameter, or a tensor of its shape such as a gradient, to GGUF's shape: (rows, row length), experts
    first if stacked. The rows stay in torch's order; `row_orders` finds GGUF's.
    """

    name: str
    parameter: nn.Parameter
    view: Callable[[torch.Tensor], torch.Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, row length), experts first if stacked."""
        return tuple(self.view(self.parameter.detach()).shape)


@dataclass(frozen=True)
class GgufLayout:
    """How a GGUF stores a torch model's weights: its name of each parameter, and its order of their rows."""

    names: Callable[[str], str | None]  # torch's parameter name -> GGUF's (`samq.gguf.file.gguf_names`)
    row_orders: Mapping[str, np.ndarray] = field(default_factory=dict)  # see `row_orders`
    unknown: Mapping[str, str] = field(default_factory=dict)  # weight that is not measured -> why


class UnknownLayoutError(SamqError):
    """A tensor of the GGUF is not torch's weight in any way of storing it that SAMQ knows."""


def weights_of(model: PreTrainedModel, names: Callable[[str], str | None]) -> list[Weight]:
    """Every weight matrix of the model that has a GGUF name, in the model's order, tied weights once.

    `names` maps torch's parameter names to GGUF's (`samq.gguf.file.gguf_names`). Vectors are left out, since llama.cpp
    never quantizes them; so are weights that several parameters make up. Raises SamqError if no parameter has a GGUF name.
    """
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    weights: dict[str, Weight] = {}
    shared: set[str] = set()
    for hf_name, parameter in model.named_parameters():  # a tied weight comes once, under the embedding's name
        if parameter.ndim not in (2, 3):
            continue
        for name, view in _gguf_views(hf_name, names).items():
            if parameter.ndim == 3 and "_exps." not in name:
                continue  # a convolution, which llama.cpp never quantizes
            if name in weights:
                shared.add(name)
            weights[name] = Weight(name, parameter, torch.t if id(parameter) in transposed else view)
    for name in sorted(shared):
        logger.warning("several parameters make up %s, which is not measured", name)
        del weights[name]
    if not weights:
        raise SamqError(
            f"no weight of {type(model).__name__} has a GGUF name; check that the GGUF was converted from this model"
        )
    return list(weights.values())


def _gguf_views(hf_name: str, names: Callable[[str], str | None]) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """GGUF name -> view, for the one tensor or the two tensors that GGUF stores for a parameter."""
    if hf_name.endswith("experts.gate_up_proj"):  # transformers stacks the halves along the rows, llama.cpp splits them
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
    """GGUF's tensor name; torch's names of stacked experts lack the `.weight`."""
    return name if name.endswith(".weight") else f"{name}.weight"


def _half(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.chunk(2, dim=-2)[index]


def rotary_row_order(rows: int, heads: int) -> np.ndarray:
    """GGUF row -> torch row, where llama.cpp's converter interleaved the two halves of each rotary head.

    Source: `LlamaModel.permute` in llama.cpp's conversion/llama.py.
    """
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def row_orders(weights: list[Weight], gguf: Path, progress: Progress = silent) -> dict[str, np.ndarray]:
    """Find the order of each weight's rows in a full-precision GGUF of the same model; without weights in torch's order.

    `order[i]` is the torch row that GGUF has as row i. The function compares every weight, up to rounding. It raises
    SamqError for a tensor in an order that it does not know, and so for a GGUF of another model, and for values that are no
    numbers or that the GGUF's type cannot hold.
    """
    orders = {}
    for name, found in _compared(weights, gguf, progress):
        if isinstance(found, UnknownLayoutError):
            raise found
        if found is not None:
            orders[name] = found
    return orders


def read_layout(
    model: PreTrainedModel, names: Callable[[str], str | None], gguf: Path, progress: Progress = silent
) -> GgufLayout:
    """Compare every weight with the GGUF's: which are there, in which order of rows, and which cannot be told.

    A weight whose layout is unknown is not measured; `unknown` says why, and `names` no longer has it. Raises SamqError if
    they are most of all weights: then the GGUF is another model's.
    """
    compared = dict(_compared(weights_of(model, names), gguf, progress))
    orders = {name: found for name, found in compared.items() if isinstance(found, np.ndarray)}
    unknown = {name: str(found) for name, found in compared.items() if isinstance(found, UnknownLayoutError)}
    known = compared.keys() - unknown.keys()
    if reason := mostly_unknown(read_tensors(gguf), known):
        raise SamqError(f"{reason}: {next(iter(unknown.values()), 'torch has no weights of their names')}")

    def known_name(hf_name: str) -> str | None:
        name = names(hf_name)
        return None if name is None or _tensor(name) in unknown else name

    return GgufLayout(known_name, orders, unknown)


def _compared(
    weights: list[Weight], gguf: Path, progress: Progress
) -> Iterator[tuple[str, np.ndarray | UnknownLayoutError | None]]:
    """Yield each weight's name and order of rows (None: torch's), or the error that says why its layout is unknown."""
    find, rotated = _finder(gguf), _rotary_heads(read_metadata(gguf))
    for done, weight in enumerate(weights):
        progress(done, len(weights))
        try:
            yield weight.name, _row_order(weight, find(weight), gguf, rotated)
        except UnknownLayoutError as error:
            yield weight.name, error
    progress(len(weights), len(weights))


def _row_order(weight: Weight, stored: ReaderTensor, gguf: Path, rotated: Mapping[str, int]) -> np.ndarray | None:
    """The torch row of each of GGUF's rows; None if they are in torch's order. UnknownLayoutError if it is not known."""
    in_torch = weight.view(weight.parameter.detach()).to("cpu", torch.float32).numpy()
    in_gguf = _read(gguf, stored)
    if _same(in_torch, in_gguf):
        return None
    heads = rotated.get(weight.name.rpartition("attn_")[2])
    order = rotary_row_order(len(in_torch), heads) if heads and len(in_torch) % (2 * heads) == 0 else None
    if order is None or not _same(in_torch[order], in_gguf):
        _require_finite(weight.name, in_torch, in_gguf, gguf)
        raise UnknownLayoutError(
            f"{weight.name} in {gguf} is not torch's weight, in any order of rows that SAMQ knows; {_ANOTHER_MODEL}"
        )
    return order


def _require_finite(name: str, in_torch: np.ndarray, in_gguf: np.ndarray, gguf: Path) -> None:
    """Raise SamqError if a weight is not finite: then its layout is not the question."""
    if not np.isfinite(in_torch).all():
        raise SamqError(
            f"{name} of the model holds NaN or infinity; download the checkpoint again, or choose another one"
        )
    if not np.isfinite(in_gguf).all():
        raise SamqError(
            f"{name} of the model has weights up to {np.abs(in_torch).max():.3g} and F16 ends at 65504, so that {gguf} holds "
            "infinity; set model.precision to BF16, or give a GGUF that llama.cpp's converter wrote with --outtype bf16"
        )


def stored_tensors(weights: list[Weight], gguf: Path) -> dict[str, ReaderTensor]:
    """GGUF name -> the GGUF's tensor, for every weight; raises SamqError if one is missing or has another shape."""
    find = _finder(gguf)
    return {weight.name: find(weight) for weight in weights}


def _finder(gguf: Path) -> Callable[[Weight], ReaderTensor]:
    """A function that gives a weight's tensor, and raises UnknownLayoutError if it is missing or has another shape."""
    stored = {tensor.name: tensor for tensor in open_gguf(gguf).tensors}
    shapes = {name: tensor.shape for name, tensor in read_tensors(gguf).items()}

    def find(weight: Weight) -> ReaderTensor:
        if shapes.get(weight.name) != weight.shape:
            raise UnknownLayoutError(
                f"{weight.name} is {weight.shape} in torch, but {gguf} has {shapes.get(weight.name, 'no such tensor')}; "
                f"{_ANOTHER_MODEL}"
            )
        return stored[weight.name]

    return find


def _read(gguf: Path, tensor: ReaderTensor) -> np.ndarray:
    """Read a tensor in float32. Not through the memory map, whose pages would stay in memory beside the model."""
    stored = np.fromfile(gguf, tensor.data.dtype, tensor.data.size, offset=tensor.data_offset)
    weights = dequantize(stored.reshape(tensor.data.shape), tensor.tensor_type)
    return weights.reshape(tuple(reversed(tensor.shape)))


def _rotary_heads(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Number of heads of the rotated projections, if the file gives one number for all layers."""
    prefix = f"{metadata['general.architecture']}.attention."
    heads = metadata.get(f"{prefix}head_count", 0)
    return {"q.weight": heads, "k.weight": metadata.get(f"{prefix}head_count_kv", heads)}


def _same(in_torch: np.ndarray, in_gguf: np.ndarray) -> bool:
    return np.allclose(in_torch, in_gguf, rtol=RELATIVE_ROUNDING, atol=ABSOLUTE_ROUNDING)
