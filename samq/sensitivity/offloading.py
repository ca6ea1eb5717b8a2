"""Weights that are not where they are computed with: on disk, or in the host's memory beside a GPU.

A parameter on disk is on torch's meta device, and `keep_on_disk` notes in it where its values are. A block's weights are
brought to the device for as long as it runs, and those of the next one meanwhile, by another thread.
"""

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import nn

from samq.sensitivity.transfer import Transfer, now

logger = logging.getLogger(__name__)

READERS = 4  # threads that read a block's weights
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


class Residence:
    """Brings the weights of blocks to the device that computes, during a `with` block."""

    def __init__(self, blocks: list[nn.Module], device: torch.device) -> None:
        """`device` is for the blocks that are on disk or in the host's memory; others run where they are."""
        self.blocks = blocks
        self.devices = [_device(block, device) for block in blocks]
        self._elsewhere = [_elsewhere(block, device) for block, device in zip(blocks, self.devices, strict=True)]
        self._coming: dict[int, list[tuple[_Place, Future[nn.Parameter]]]] = {}
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="fetch-block")
        self._local = threading.local()  # a thread's way to each GPU

    def __enter__(self) -> Self:
        """Nothing is fetched yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)
        self._coming.clear()

    @contextmanager
    def block(self, number: int, then: int | None) -> Iterator[nn.Module]:
        """The block with its weights on its device; meanwhile those of block number `then` are fetched."""
        coming = self._coming.pop(number, None) or self._fetch(number)
        copies = {place: future.result() for place, future in coming}
        if then is not None and 0 <= then < len(self.blocks) and then not in self._coming:
            self._coming[then] = self._fetch(then)
        logger.debug("block %d runs, then block %s", number, then)
        with _in_place(copies):
            yield self.blocks[number]

    def _fetch(self, number: int) -> "list[tuple[_Place, Future[nn.Parameter]]]":
        device = self.devices[number]
        parameters = self._elsewhere[number]
        # Memory for all, from what the computing stream has freed: a thread's own stream would have a pool of its own.
        into = [torch.empty(parameter.shape, dtype=parameter.dtype, device=device) for _, parameter in parameters]
        free = now(device)
        return [
            (place, self._threads.submit(self._copy, parameter, copy, free))
            for (place, parameter), copy in zip(parameters, into, strict=True)
        ]

    def _copy(self, parameter: nn.Parameter, into: torch.Tensor, free: Any) -> nn.Parameter:
        """The parameter's values in `into`, which nothing uses after the event `free`."""
        stored: StoredTensor | None = getattr(parameter, _STORED, None)
        with stored.opened() if stored is not None else nullcontext(parameter.detach()) as values:
            copy = self._transfer(into.device).to_gpu(values, into, free) if into.is_cuda else into.copy_(values)
        return nn.Parameter(copy, requires_grad=False)

    def _transfer(self, device: torch.device) -> Transfer:
        """This thread's way to a GPU."""
        transfers: dict[torch.device, Transfer] = self._local.__dict__.setdefault("transfers", {})
        if device not in transfers:
            transfers[device] = Transfer(device)
        return transfers[device]


_Place = tuple[nn.Module, str]


def _elsewhere(block: nn.Module, device: torch.device) -> list[tuple[_Place, nn.Parameter]]:
    """Those of a block's parameters that are not on the device, by their places."""
    return [
        ((module, name), parameter)
        for module in block.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.device != device
    ]


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
