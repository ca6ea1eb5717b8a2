"""Where a full-precision GGUF has the weights of a torch model, found by comparing their values."""

import logging
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, ReaderTensor, dequantize
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from samq.errors import SamqError
from samq.gguf.file import TensorInfo, mostly_unknown, open_gguf, read_tensors
from samq.gguf.formats import EMBEDDING, OUTPUT
from samq.progress import Progress, silent
from samq.sensitivity.offloading import values_of
from samq.sensitivity.views import MakeView, View, storages, turned

logger = logging.getLogger(__name__)

# The largest rounding error between two full-precision copies of a weight: BF16 has 8 bits, F16 nothing below 2^-25.
RELATIVE_ROUNDING = 2.0**-7
ABSOLUTE_ROUNDING = 2.0**-24
_FIRST_VALUES = 4096  # that are compared before the whole
_PART_VALUES = 2**22  # that are compared at a time

_EXPERTS = re.compile(r"_exps\b")
_TORCH_LACKS = "torch has no weight of its name"

Names = Callable[[str], str | None]  # torch's parameter name -> GGUF's (`samq.gguf.file.gguf_names`)


@dataclass(frozen=True)
class Weight:
    """A weight matrix, or a stack of experts' matrices, of a torch model, as the GGUF has it."""

    name: str  # GGUF's
    parameter: nn.Parameter
    view: View
    user: nn.Module | None = None  # the module that uses this copy, where the GGUF has one for each; None: all of them

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """(rows, row length), experts first if stacked."""
        return tuple(self.view(torch.empty(self.parameter.shape, device="meta")).shape)


@dataclass(frozen=True)
class GgufLayout:
    """The weights of a torch model, and those of its GGUF that are not among them."""

    weights: list[Weight]
    unknown: Mapping[str, str] = field(default_factory=dict)  # the GGUF's tensor that is not measured -> why
    views: Mapping[str, int | None] = field(default_factory=dict)  # which view of the table each tensor has

    @property
    def unmeasured(self) -> str:
        """What to say of the tensors that are not measured, eight of them by name."""
        reasons = list(self.unknown.values())
        more = f"; and {len(reasons) - 8} more" if len(reasons) > 8 else ""
        return f"{len(reasons)} tensors are not measured: {'; '.join(reasons[:8])}{more}"


@dataclass(frozen=True)
class _Stored:
    """A tensor that may hold a parameter, and the views that it may have of it."""

    name: str
    parameter: nn.Parameter
    views: tuple[View, ...]
    user: nn.Module | None = None


def weights_of(model: PreTrainedModel, names: Names) -> list[Weight]:
    """Every weight matrix of the model that has a GGUF name, in the model's order and as torch has it, tied weights once.

    Vectors are left out, since llama.cpp never quantizes them; so are tensors that several parameters make up. Raises
    SamqError if no parameter has a GGUF name.
    """
    return [Weight(stored.name, stored.parameter, stored.views[0]) for stored in _stored(model, names, None)]


def read_layout(
    model: PreTrainedModel,
    names: Names,
    gguf: Path,
    progress: Progress = silent,
    views: Mapping[str, int | None] | None = None,
) -> GgufLayout:
    """Find every weight in a full-precision GGUF of the same model, by its values, or by the `views` that were found before.

    A tensor that is not torch's weight in any view of the table is not measured, and `unknown` says why. Raises SamqError if
    that is most of the GGUF: then it is another model's. Raises it too for values that are no numbers, or that the GGUF's
    type cannot hold.
    """
    tensors = read_tensors(gguf)
    weights, unknown = [], dict[str, str]()
    candidates = _stored(model, names, tensors.keys())
    if views is None:
        views = _compare([stored for stored in candidates if stored.name in tensors], gguf, progress)
    for stored in candidates:
        if stored.name not in tensors:
            unknown[stored.name] = f"{stored.name} is a weight in torch, and {gguf} has no such tensor"
        elif (number := views[stored.name]) is None:
            unknown[stored.name] = f"{stored.name} is not torch's weight in any way of storing it that SAMQ knows"
        else:
            weights.append(Weight(stored.name, stored.parameter, stored.views[number], stored.user))
    known = {weight.name for weight in weights}
    for name in sorted(_matrices(tensors) - known - unknown.keys()):
        unknown[name] = f"{name}: {_TORCH_LACKS}"
    if reason := mostly_unknown(tensors, known):
        raise SamqError(f"{reason}: {next(iter(unknown.values()), _TORCH_LACKS)}; give the GGUF that was made from it")
    return GgufLayout(weights, unknown, views)


def _matrices(tensors: Mapping[str, TensorInfo]) -> set[str]:
    """The tensors that llama-quantize would quantize: the converter leaves the others in float32."""
    return {
        name
        for name, tensor in tensors.items()
        if name.endswith(".weight") and len(tensor.shape) > 1 and tensor.type != "F32"
    }


def _stored(model: PreTrainedModel, names: Names, there: Set[str] | None) -> list[_Stored]:
    """The tensors of the model's weight matrices, in the model's order; `there` are the file's, if a file is known."""
    config = model.config.get_text_config()
    conv1d = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    stored_tensors: dict[str, _Stored] = {}
    shared: set[str] = set()
    for hf_name, parameter in model.named_parameters():  # a tied weight comes once, under the embedding's name
        if parameter.ndim not in (2, 3):
            continue
        for name, makers in _tensors(hf_name, names, there).items():
            if parameter.ndim == 3 and not _EXPERTS.search(name):
                continue  # a convolution, which llama.cpp never quantizes
            shape = tuple(parameter.shape)
            views = [make(config, shape) for make in ((turned,) if id(parameter) in conv1d else makers)]
            if name in stored_tensors:
                shared.add(name)
            stored_tensors[name] = _Stored(name, parameter, tuple(view for view in views if view is not None))
    _split_tied(model, stored_tensors, there or set())
    for name in sorted(shared):
        logger.warning("several parameters make up %s, which is not measured", name)
        del stored_tensors[name]
    if not stored_tensors:
        raise SamqError(
            f"no weight of {type(model).__name__} has a GGUF name; check that the GGUF was converted from this model"
        )
    return [stored for stored in stored_tensors.values() if stored.views]


def _split_tied(model: PreTrainedModel, stored: dict[str, _Stored], there: Set[str]) -> None:
    """Let each of two copies of a tied weight, which some GGUFs have, be measured where it is used."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if (
        {EMBEDDING, OUTPUT} <= there
        and EMBEDDING in stored
        and output is not None
        and embedding.weight is output.weight
    ):
        tied = stored[EMBEDDING]
        for name, user in ((EMBEDDING, embedding), (OUTPUT, output)):
            stored[name] = replace(tied, name=name, user=user)


def _tensors(hf_name: str, names: Names, there: Set[str] | None) -> dict[str, tuple[MakeView, ...]]:
    """GGUF name -> makers of views, of the tensors that hold a parameter: all there, or else the first that have names."""
    with_names = []
    for storage in storages(hf_name):
        gguf_names = {name: _weight_name(names(name)) for name in storage}
        if all(gguf_names.values()):
            with_names.append({str(gguf_names[name]): makers for name, makers in storage.items()})
    complete = [tensors for tensors in with_names if there is None or tensors.keys() <= there]
    return next(iter(complete or with_names[-1:]), {})


def _weight_name(name: str | None) -> str | None:
    """The tensor's name in the file: torch's names of stacked experts lack the `.weight`. None if it is no weight."""
    if name is None or name.endswith(".weight"):
        return name
    return f"{name}.weight" if _EXPERTS.search(name) else None


def _compare(candidates: list[_Stored], gguf: Path, progress: Progress) -> dict[str, int | None]:
    """The number of the view that each tensor has, by its values; None if it has none of those that are possible."""
    readers = {tensor.name: tensor for tensor in open_gguf(gguf).tensors}
    views = {}
    for done, stored in enumerate(candidates):
        progress(done, len(candidates))
        views[stored.name] = _view(stored, readers[stored.name], gguf)
    progress(len(candidates), len(candidates))
    return views


def _view(stored: _Stored, tensor: ReaderTensor, gguf: Path) -> int | None:
    """The number of the view that the tensor has of the parameter; None if it has none of those that are possible."""
    parameter = values_of(stored.parameter)
    in_gguf = _read(gguf, tensor)
    for number, view in enumerate(stored.views):
        in_torch = view(parameter)
        if in_torch.shape == in_gguf.shape and _same(in_torch.cpu(), in_gguf):
            return number
    _require_finite(stored.name, parameter.to("cpu", torch.float32).numpy(), in_gguf.float().numpy(), gguf)
    return None


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


def _read(gguf: Path, tensor: ReaderTensor) -> torch.Tensor:
    """Read a tensor, in the type that it is stored in if torch has that, or else in float32.

    Not through the memory map, whose pages would stay in memory beside the model.
    """
    stored = np.fromfile(gguf, tensor.data.dtype, tensor.data.size, offset=tensor.data_offset)
    if tensor.tensor_type == GGMLQuantizationType.BF16:
        weights = torch.from_numpy(stored).view(torch.bfloat16)
    elif tensor.tensor_type in (GGMLQuantizationType.F16, GGMLQuantizationType.F32):
        weights = torch.from_numpy(stored)
    else:
        weights = torch.from_numpy(dequantize(stored.reshape(tensor.data.shape), tensor.tensor_type))
    return weights.reshape(tuple(map(int, reversed(tensor.shape))))


def _same(in_torch: torch.Tensor, in_gguf: torch.Tensor) -> bool:
    """Whether they are equal up to rounding. The first values mostly tell another order, without a pass over all."""
    in_torch, in_gguf = in_torch.reshape(-1), in_gguf.reshape(-1)
    if not _near(in_torch[:_FIRST_VALUES], in_gguf[:_FIRST_VALUES]):
        return False
    if in_torch.dtype == in_gguf.dtype and torch.equal(in_torch, in_gguf):
        return True
    parts = zip(in_torch.split(_PART_VALUES), in_gguf.split(_PART_VALUES), strict=True)
    return all(_near(one, other) for one, other in parts)


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=RELATIVE_ROUNDING, atol=ABSOLUTE_ROUNDING)
