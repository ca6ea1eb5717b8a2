"""Where a model's weights are while it is measured: on the device that computes, or elsewhere until they are needed."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, remove_hook_from_submodules
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming

from samq.errors import SamqError
from samq.sensitivity.block_calls import NotApart
from samq.sensitivity.blocks import block_list, cannot_run
from samq.sensitivity.memory import compute_devices, free_bytes
from samq.sensitivity.offloading import StoredTensor, bytes_of, keep_on_disk, stored_of
from samq.sensitivity.residence import bytes_brought

# The memory that a model needs to stay there while it is measured, in shares of its weights. Gram matrices, activations and
# hidden states took 0.5 to 1.6 times the weights on a GPU (8B, and 4 blocks of 70B).
WHOLE_SHARE = 2.0
LEAST_SHARE = 1.25  # of a model that does not come apart: its weights, and what a batch takes at least
_FIRST = "cuda:0"  # of all GPUs


def _room(device: str, limit: int | None) -> list[int]:
    """Bytes that a model may take of the device, or of each GPU for `auto`."""
    return [free_bytes(place) if limit is None else limit for place in compute_devices(device)]


def placement(
    skeleton: PreTrainedModel, device: str, elsewhere: str, limit: int | None, share: float = WHOLE_SHARE
) -> str | dict[str, str]:
    """Transformers' device map: `device` if it has room for the model, or else its blocks `elsewhere` (disk or cpu).

    The matrices around blocks on disk are there as well: embedding and output.

    Args:
        skeleton: the model on the meta device, in the type that it is computed with.
        device: a torch device, or auto for all GPUs.
        elsewhere: where the blocks wait: disk, or cpu beside a GPU.
        limit: bytes of each device's memory that the measurement may take; None for what is free.
        share: the memory that a model needs to be on the device, in shares of its weights.

    Raises:
        SamqError: the model does not fit, and has no blocks that could wait, or a GPU does not hold two of them.
    """
    size, room = bytes_of(skeleton.parameters()) * share, _room(device, limit)
    if device == "auto" and size <= room[0]:
        return _FIRST  # the others get copies of a block while it runs
    if size <= sum(room) or device == elsewhere:
        return device
    try:
        layers = block_list(skeleton)
    except NotApart as reason:
        if share > LEAST_SHARE:
            return placement(skeleton, device, elsewhere, limit, LEAST_SHARE)
        raise cannot_run(skeleton, reason) from reason
    if gpus := [free_bytes(place) for place in compute_devices(device) if place.type == "cuda"]:
        require_room_for_blocks(skeleton, layers, min(gpus))
    names = {module: name for name, module in skeleton.named_modules()}
    return _beside(skeleton, names[layers], {"auto": _FIRST}.get(device, device), elsewhere)


def require_room_for_blocks(skeleton: PreTrainedModel, layers: nn.ModuleList, room: int) -> None:
    """Raise SamqError if a device with `room` bytes does not hold a block and the next one, with an expert of each stack."""
    needed = 2 * max(bytes_brought(layer, room) for layer in layers)
    if needed > room:
        raise SamqError(
            f"a block of {type(skeleton).__name__} and the next one take {needed / 2**30:.1f} GiB of the GPU, which has "
            f"{room / 2**30:.1f} GiB free; use a GPU with more memory, a smaller type (bfloat16), or the CPU (device)"
        )


def _beside(module: nn.Module, blocks: str, device: str, elsewhere: str, prefix: str = "") -> dict[str, str]:
    """The device map that has the module list `blocks` elsewhere, and what is around it by `_around`."""
    places: dict[str, str] = {}
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if full == blocks:
            places[full] = elsewhere
        elif blocks.startswith(f"{full}."):
            places |= _beside(child, blocks, device, elsewhere, f"{full}.")
        else:
            places |= _around(child, full, device, elsewhere)
    return places


def _around(module: nn.Module, name: str, device: str, elsewhere: str) -> dict[str, str]:
    """The device map of a module beside the blocks: matrices on disk if the blocks are, and all else on the device."""
    if elsewhere != "disk" or not any(parameter.ndim > 1 for parameter in module.parameters()):
        return {name: device}
    children, own = dict(module.named_children()), [*module.parameters(False), *module.buffers(False)]
    if not children:
        return {name: elsewhere}
    if own:
        return {name: device}
    places: dict[str, str] = {}
    for child, inner in children.items():
        places |= _around(inner, f"{name}.{child}", device, elsewhere)
    return places


def offload_folder() -> str:
    """A folder for weights that transformers has to write anew, since their file has them otherwise; deleted at exit."""
    folder = tempfile.TemporaryDirectory(prefix="samq-weights-", ignore_cleanup_errors=True)
    _kept.append(folder)
    return folder.name


_kept: list[tempfile.TemporaryDirectory[str]] = []


@contextmanager
def not_read(skeleton: PreTrainedModel, places: str | dict[str, str]) -> Iterator[None]:
    """Let transformers leave on disk, unread, what stays there as it is: it would read each tensor and forget it."""
    on_disk = [name for name, place in places.items() if place == "disk"] if isinstance(places, dict) else []
    names = {
        name
        for name, _ in skeleton.named_parameters(remove_duplicate=False)
        if any(name.startswith(f"{part}.") for part in on_disk)
    }
    convert: Any = WeightRenaming.convert

    def skip(renaming: Any, layer_name: str, *arguments: Any, hf_quantizer: Any = None, **more: Any) -> Any:
        if layer_name not in names or hf_quantizer is not None:
            return convert(renaming, layer_name, *arguments, hf_quantizer=hf_quantizer, **more)
        renaming.collected_tensors.clear()
        return {layer_name: torch.empty(0, device="meta")}

    setattr(WeightRenaming, "convert", skip)  # noqa: B010
    try:
        yield
    finally:
        setattr(WeightRenaming, "convert", convert)  # noqa: B010


def take_over(model: PreTrainedModel) -> None:
    """Note in each parameter that accelerate keeps elsewhere where it is, and remove accelerate's hooks.

    They would read a block's weights again for every batch.
    """
    buffers = []
    for module in model.modules():
        for hook in _hooks(module):
            if hook.offload and hook.weights_map is not None:
                for name, parameter in list(module.named_parameters(recurse=False)):
                    _note(module, name, parameter, hook)
                buffers += [(module, name, hook.execution_device) for name, _ in module.named_buffers(recurse=False)]
    remove_hook_from_submodules(model)  # which moves buffers to where they were loaded
    for module, name, device in buffers:
        module._buffers[name] = getattr(module, name).to(device)
    _tie(model)


def _hooks(module: nn.Module) -> list[AlignDevicesHook]:
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook)]


def _note(module: nn.Module, name: str, parameter: nn.Parameter, hook: Any) -> None:
    key, loader = f"{hook.weights_map.prefix}{name}", hook.weights_map.dataset
    if key in loader.state_dict:
        values = loader.state_dict[key]
        module._parameters[name] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    elif (entry := loader.index.get(key)) is None:  # the file has it under the name of a parameter that it is tied to
        return
    elif "safetensors_file" in entry:
        file, device = Path(entry["safetensors_file"]), torch.empty(0, device=hook.execution_device).device
        keep_on_disk(parameter, StoredTensor(file, entry.get("weight_name", key), parameter.dtype, device))
    else:
        raise SamqError(f"{key} is kept in a way that SAMQ does not read; give the model as safetensors")


def _tie(model: PreTrainedModel) -> None:
    """Let parameters on disk be one where they would be in memory: transformers and accelerate leave them apart there."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for target, source in list(model.all_tied_weights_keys.items()):
        one, other = parameters.get(source), parameters.get(target)
        if one is None or other is None or one is other:
            continue
        stored, others = stored_of(one), stored_of(other)
        if stored and others and not stored.has_values_of(others, one):
            model.all_tied_weights_keys.pop(target)  # a file with two that differ
        elif stored or others:
            name, kept = (target, one) if stored else (source, other)
            parent, _, own = name.rpartition(".")
            parameters[name] = model.get_submodule(parent)._parameters[own] = kept
