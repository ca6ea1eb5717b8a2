"""Weights that are not where they are computed with: on disk, or in the host's memory beside a GPU.

A parameter on disk is on torch's meta device, and `keep_on_disk` notes in it where its values are. A block's weights are
brought to the device for as long as it runs, and those of the next one meanwhile, by another thread.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import nn

_STORED = "samq_stored"  # attribute of a parameter that is on disk


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, and the type that it is computed with."""

    file: Path
    name: str
    dtype: torch.dtype

    def read(self) -> torch.Tensor:
        """Its values, in the host's memory."""
        with safe_open(self.file, "pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.name)
            return tensor.to(self.dtype, copy=True)  # a copy: the tensor itself keeps the file's pages in memory


def keep_on_disk(parameter: nn.Parameter, stored: StoredTensor) -> None:
    """Note where the values of a parameter on the meta device are."""
    setattr(parameter, _STORED, stored)


def is_offloaded(parameter: torch.Tensor) -> bool:
    """Whether the parameter's values are on disk."""
    return hasattr(parameter, _STORED)


def values_of(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter's values: read into the host's memory if they are on disk, or else where they are."""
    stored: StoredTensor | None = getattr(parameter, _STORED, None)
    return parameter.detach() if stored is None else stored.read()


class Residence:
    """Brings the weights of blocks to the device that computes, during a `with` block."""

    def __init__(self, blocks: list[nn.Module], device: torch.device) -> None:
        """`device` is for the blocks that are on disk or in the host's memory; others run where they are."""
        self.blocks = blocks
        self.devices = [_device(block, device) for block in blocks]
        self._elsewhere = [_elsewhere(block, device) for block, device in zip(blocks, self.devices, strict=True)]
        self._coming: dict[int, Future[_Copies]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fetch-block")

    def __enter__(self) -> Self:
        """Nothing is fetched yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)
        self._coming.clear()

    @contextmanager
    def block(self, number: int, then: int | None) -> Iterator[nn.Module]:
        """The block with its weights on its device; meanwhile those of block number `then` are fetched."""
        copies = (self._coming.pop(number, None) or self._fetch(number)).result()
        if then is not None and 0 <= then < len(self.blocks) and then not in self._coming:
            self._coming[then] = self._fetch(then)
        copies.wait()
        with _in_place(copies.parameters):
            yield self.blocks[number]

    def _fetch(self, number: int) -> "Future[_Copies]":
        return self._thread.submit(_copies, self._elsewhere[number], self.devices[number])


_Place = tuple[nn.Module, str]


@dataclass(frozen=True)
class _Copies:
    """Copies of parameters, by their places, and the event after which a GPU has them."""

    parameters: Mapping[_Place, nn.Parameter]
    event: Any = None

    def wait(self) -> None:
        if self.event is not None:
            stream = torch.cuda.current_stream(next(iter(self.parameters.values())).device)
            stream.wait_event(self.event)
            for parameter in self.parameters.values():
                parameter.record_stream(stream)


def _elsewhere(block: nn.Module, device: torch.device) -> list[tuple[_Place, nn.Parameter]]:
    """Those of a block's parameters that are not on the device, by their places."""
    return [
        ((module, name), parameter)
        for module in block.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.device != device
    ]


def _copies(places: list[tuple[_Place, nn.Parameter]], device: torch.device) -> _Copies:
    """Copies of parameters on the device."""
    if device.type != "cuda" or not places:
        return _Copies({place: _frozen(values_of(parameter).to(device)) for place, parameter in places})
    stream = torch.cuda.Stream(device)
    pinned: list[torch.Tensor] = []
    copies: dict[_Place, nn.Parameter] = {}
    with torch.cuda.stream(stream):
        for place, parameter in places:
            pinned.append(values_of(parameter).pin_memory())
            copies[place] = _frozen(pinned[-1].to(device, non_blocking=True))
    event = torch.cuda.Event()
    event.record(stream)
    event.synchronize()  # in this thread; until then the pinned memory is in use
    return _Copies(copies, event)


def _frozen(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


@contextmanager
def _in_place(copies: Mapping[_Place, nn.Parameter]) -> Iterator[None]:
    """Let the copies stand for the parameters."""
    originals = {(module, name): module._parameters[name] for module, name in copies}
    try:
        for (module, name), copy in copies.items():
            module._parameters[name] = copy
        yield
    finally:
        for (module, name), original in originals.items():
            module._parameters[name] = original


def _device(block: nn.Module, device: torch.device) -> torch.device:
    """Where a block computes: on the given device if its weights are on disk or in the host's memory, or else where they are."""
    places = {parameter.device for parameter in block.parameters()}
    here = next(iter(places), device)
    return here if len(places) == 1 and here.type == "cuda" else device


def bytes_of(parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of the parameters' values in the type that they are computed with."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
