"""Weights that are not where they are computed with: on disk, or in the host's memory beside a GPU.

A parameter on disk is on torch's meta device, and `keep_on_disk` notes in it where its values are. A block's weights are
brought to the device for as long as it runs, and those of the next one meanwhile, by another thread.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import nn

from samq.sensitivity.transfer import Transfer, now

logger = logging.getLogger(__name__)

READERS = 8  # threads that read a block's weights
_VALUES_AT_A_TIME = 2**25  # that a thread copies
_STORED = "samq_stored"  # attribute of a parameter that is on disk


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, and the type that it is computed with."""

    file: Path
    name: str
    dtype: torch.dtype

    @contextmanager
    def opened(self) -> Iterator[torch.Tensor]:
        """Its values as the file has them, whose pages are in memory as long as the tensor."""
        with safe_open(self.file, "pt") as file:
            yield file.get_tensor(self.name)

    def read(self) -> torch.Tensor:
        """Its values, in the host's memory."""
        with self.opened() as values:
            return values.to(self.dtype, copy=True)


def keep_on_disk(parameter: nn.Parameter, stored: StoredTensor) -> None:
    """Note where the values of a parameter on the meta device are."""
    setattr(parameter, _STORED, stored)


def is_offloaded(parameter: torch.Tensor) -> bool:
    """Whether the parameter's values are on disk."""
    return hasattr(parameter, _STORED)


def has_offloaded(module: nn.Module) -> bool:
    """Whether some of the module's weights are on disk."""
    return any(map(is_offloaded, module.parameters()))


def values_of(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter's values: read into the host's memory if they are on disk, or else where they are."""
    stored: StoredTensor | None = getattr(parameter, _STORED, None)
    return parameter.detach() if stored is None else stored.read()


_Place = tuple[dict[str, Any], str]  # the parameters or the buffers of a module, and a name


class Placed:
    """A part of the model, while its weights are on the devices that compute."""

    def __init__(self, part: "_Part", copies: Mapping[torch.device, list[tuple[_Place, torch.Tensor]]]) -> None:
        self.devices = part.devices  # of each share of the sequences
        self.module = part.module
        self._copies = copies

    def release(self) -> None:
        """Let go of the copies, whoever still has this object."""
        self._copies = {}

    @contextmanager
    def on(self, device: torch.device) -> Iterator[nn.Module]:
        """The part with its weights on one of these devices."""
        copies = self._copies.get(device, [])
        originals = [(place, place[0][place[1]]) for place, _ in copies]
        try:
            for (tensors, name), copy in copies:
                tensors[name] = copy
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                yield self.module
        finally:
            for (tensors, name), original in originals:
                tensors[name] = original


class Residence:
    """Brings the weights of a model's parts to the devices that compute, during a `with` block."""

    def __init__(self, blocks: list[nn.Module], around: nn.Module, devices: list[torch.device]) -> None:
        """The parts are the blocks and, last, what is around them: all other modules of the model `around`.

        If there is one device, it is for the blocks that are on disk or in the host's memory, and others run where they are.
        Several compute every part, and each gets copies of the weights that it lacks. If what is around the blocks is on
        several devices itself, it stays as it is.
        """
        self._blocks = blocks if len(devices) > 1 else []
        self._parts = [
            _Part(block, list(block.modules()), devices if len(devices) > 1 else [_device(block, devices[0])])
            for block in blocks
        ]
        inside = {module for part in self._parts for module in part.modules}
        outside = [module for module in around.modules() if module not in inside]
        spread = any(tensor.device != devices[0] for _, tensor in _tensors(outside))
        self._parts.append(_Part(around, [] if spread else outside, devices[:1] * len(devices) if spread else devices))
        self._coming: dict[int, Callable[[], Placed]] = {}
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="fetch-block")
        self._local = threading.local()  # a thread's way to the GPUs

    def __enter__(self) -> Self:
        """Nothing is fetched yet."""
        self._hooked = _without_hooks(self._blocks)
        self._hooked.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)
        self._coming.clear()
        self._hooked.__exit__(None, None, None)

    @contextmanager
    def part(self, number: int, then: int | None) -> Iterator[Placed]:
        """A part with its weights on its devices; meanwhile those of part number `then` are fetched."""
        placed = (self._coming.pop(number, None) or self._fetch(number))()
        if then is not None and 0 <= then < len(self._parts) and then not in self._coming:
            self._coming[then] = self._fetch(then)
        logger.debug("part %d runs, then part %s", number, then)
        try:
            yield placed
        finally:
            placed.release()

    def _fetch(self, number: int) -> Callable[[], Placed]:
        """Begin to fetch a part; gives the function that waits for it."""
        part = self._parts[number]
        copies: dict[torch.device, list[tuple[_Place, torch.Tensor]]] = {device: [] for device in part.devices}
        futures = []
        for original, places in part.tensors():
            devices = [device for device in copies if device != original.device]
            # Memory for all, from what the computing stream has freed: a thread's own stream would have a pool of its own.
            into = [torch.empty(original.shape, dtype=original.dtype, device=device) for device in devices]
            free = [now(device) for device in devices]
            futures += [
                self._threads.submit(self._copy, original, into, free, some) for some in _parts(original) if devices
            ]
            for device, copy in zip(devices, into, strict=True):
                own = nn.Parameter(copy, requires_grad=False) if isinstance(original, nn.Parameter) else copy
                copies[device] += [(place, own) for place in places]

        def wait() -> Placed:
            for future in futures:
                future.result()
            return Placed(part, copies)

        return wait

    def _copy(self, original: torch.Tensor, copies: list[torch.Tensor], free: list[Any], some: slice) -> None:
        """Fill some of the values of the copies, which nothing uses after the events `free`; what is on disk is read once."""
        stored: StoredTensor | None = getattr(original, _STORED, None)
        with stored.opened() if stored is not None else nullcontext(original.detach()) as whole:
            values, into = whole.reshape(-1)[some], [copy.view(-1)[some] for copy in copies]
            if into[0].is_cuda:
                self._transfer().to_gpus(values, into, free)
                return
            for copy in into:
                copy.copy_(values)

    def _transfer(self) -> Transfer:
        """This thread's way to the GPUs."""
        if not hasattr(self._local, "transfer"):
            self._local.transfer = Transfer()
        transfer: Transfer = self._local.transfer
        return transfer


@dataclass(frozen=True)
class _Part:
    """Some modules of the model, and the devices that compute them."""

    module: nn.Module
    modules: list[nn.Module]  # whose weights are brought to the devices
    devices: list[torch.device]

    def tensors(self) -> list[tuple[torch.Tensor, list[_Place]]]:
        """The parameters and buffers that are not on all of the devices, each once, with their places."""
        places: dict[int, tuple[torch.Tensor, list[_Place]]] = {}
        for place, tensor in _tensors(self.modules):
            if any(tensor.device != device for device in self.devices):
                places.setdefault(id(tensor), (tensor, []))[1].append(place)
        return list(places.values())


def _parts(tensor: torch.Tensor) -> Iterator[slice]:
    """The tensor's values in parts that threads copy, by their numbers in order."""
    step = _VALUES_AT_A_TIME if is_offloaded(tensor) or tensor.is_contiguous() else max(1, tensor.numel())
    for first in range(0, tensor.numel(), step):
        yield slice(first, first + step)


def _tensors(modules: Iterable[nn.Module]) -> Iterator[tuple[_Place, torch.Tensor]]:
    """The parameters and buffers of modules, by their places."""
    for module in modules:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    yield (tensors, name), tensor


@contextmanager
def _without_hooks(blocks: list[nn.Module]) -> Iterator[None]:
    """Let blocks run where their inputs are: accelerate's hooks would move these to where it has put the weights."""
    modules: Any = [module for block in blocks for module in block.modules() if hasattr(module, "_old_forward")]
    hooked = [module.forward for module in modules]
    try:
        for module in modules:
            module.forward = module._old_forward
        yield
    finally:
        for module, forward in zip(modules, hooked, strict=True):
            module.forward = forward


def _device(block: nn.Module, device: torch.device) -> torch.device:
    """Where a block computes: on the given device if its weights are on disk or in the host's memory, or else where they are."""
    places = {parameter.device for parameter in block.parameters()}
    here = next(iter(places), device)
    return here if len(places) == 1 and here.type == "cuda" else device


def bytes_of(parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of the parameters' values in the type that they are computed with."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
