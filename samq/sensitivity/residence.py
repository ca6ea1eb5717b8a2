"""The parts of a model, brought to the devices that compute them for as long as they run.

A part's weights come while the part before it runs, by other threads. What is around the blocks runs twice: before the first
block and after the last. Each time no more weights come than that needs.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from samq.sensitivity.experts import one_by_one, stacks, stands_for
from samq.sensitivity.offloading import (
    Rows,
    bytes_of,
    computes_on,
    is_offloaded,
    parts_of,
    stored_of,
    without_values,
)
from samq.sensitivity.transfer import Transfer, now

logger = logging.getLogger(__name__)

READERS = min(8, len(os.sched_getaffinity(0)))  # threads that read a part's weights
BLOCKS_SHARE = 0.5  # of the room, for a block and the next one: beside them are activations, and Gram matrices

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


@dataclass(frozen=True)
class Needed:
    """The parameters around the blocks that are needed before the first block and after the last, by their ids; None: all."""

    before: frozenset[int] | None = None
    after: frozenset[int] | None = None


ALL = Needed()
NOTHING = Needed(frozenset(), frozenset())


class Residence:
    """Brings the weights of a model's parts to the devices that compute, during a `with` block.

    The parts are the blocks, in order, and two parts of all other modules: `after` the last block and `before` the first.
    These two are on the first device alone. Of what is on disk they have those weights that are needed; zeros stand for the
    others. In a block that takes too much of the `room`, experts come one by one (`samq.sensitivity.experts`).
    """

    def __init__(
        self,
        blocks: list[nn.Module],
        around: PreTrainedModel,
        devices: list[torch.device],
        needed: Needed = ALL,
        room: int | None = None,
    ) -> None:
        """The other modules are those of the model `around`; `room`: bytes of each device, None for as many as it takes.

        If there is one device, it is for what is on disk, and for blocks in the host's memory. Other parts run where they are.
        Several compute every part, and each gets copies of the weights that it lacks. If what is around the blocks is on
        several devices itself, it stays as it is.
        """
        self._blocks = blocks if len(devices) > 1 else []
        self._around = around
        self._parts = [
            _Part(
                block,
                list(block.modules()),
                devices if len(devices) > 1 else [_device(block, devices[0])],
                apart=_brought_one_by_one(block, room),
            )
            for block in blocks
        ]
        inside = {module for part in self._parts for module in part.modules}
        outside = [module for module in around.modules() if module not in inside]
        if any(computes_on(tensor) != devices[0] for _, tensor in _tensors(outside)):
            outside, devices = [], devices[:1] * len(devices)
        self.after, self.before = len(blocks), len(blocks) + 1
        self._parts.append(_Part(around, outside, devices, needed.after))
        self._parts.append(_Part(around, outside, devices[:1], needed.before))
        self._coming: dict[int, Callable[[], Placed]] = {}
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="fetch-block")
        self._local = threading.local()  # a thread's way to the GPUs

    def __enter__(self) -> Self:
        """Nothing is fetched yet."""
        with ExitStack() as changes:
            changes.enter_context(_without_hooks(self._blocks))
            if any(part.apart for part in self._parts):
                changes.enter_context(one_by_one(self._around))
            self._changes = changes.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)
        self._coming.clear()
        self._changes.close()

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
            if not part.needs(original) or id(original) in part.apart:
                for device in devices:
                    zeros = nn.Parameter(without_values(original, device), requires_grad=False)
                    if id(original) in part.apart:
                        stands_for(zeros, _Experts(self, original, device))
                    copies[device] += [(place, zeros) for place in places]
                continue
            # Memory for all, from what the computing stream has freed: a thread's own stream would have a pool of its own.
            into = [torch.empty(original.shape, dtype=original.dtype, device=device) for device in devices]
            free = [now(device) for device in devices]
            for rows in parts_of(original) if is_offloaded(original) else [...]:
                of_rows = [copy[rows] for copy in into]
                futures.append(self._threads.submit(self._copy, original, rows, of_rows, free))
            for device, copy in zip(devices, into, strict=True):
                own = nn.Parameter(copy, requires_grad=False) if isinstance(original, nn.Parameter) else copy
                copies[device] += [(place, own) for place in places]

        def wait() -> Placed:
            for future in futures:
                future.result()
            return Placed(part, copies)

        return wait

    def fetch(self, original: torch.Tensor, rows: slice, device: torch.device) -> Callable[[], torch.Tensor]:
        """Begin to fetch some rows to a device; gives the function that waits for them."""
        into = torch.empty((rows.stop - rows.start, *original.shape[1:]), dtype=original.dtype, device=device)
        future = self._threads.submit(self._copy, original, rows, [into], [now(device)])

        def wait() -> torch.Tensor:
            future.result()
            return into

        return wait

    def _copy(self, original: torch.Tensor, rows: Rows, copies: list[torch.Tensor], free: list[Any]) -> None:
        """Fill the copies of some rows, which nothing uses after the events `free`; what is on disk is read once."""
        if not copies:
            return
        stored, values = stored_of(original), original.detach()[rows]
        if stored is not None and copies[0].is_cuda:
            self._transfer().filled_to_gpus(partial(stored.read, rows=rows), copies, free)
        elif stored is not None:
            stored.read(copies[0], rows)
            for copy in copies[1:]:
                copy.copy_(copies[0])
        elif copies[0].is_cuda:
            self._transfer().to_gpus(values, copies, free)
        else:
            for copy in copies:
                copy.copy_(values)

    def _transfer(self) -> Transfer:
        """This thread's way to the GPUs."""
        if not hasattr(self._local, "transfer"):
            self._local.transfer = Transfer()
        transfer: Transfer = self._local.transfer
        return transfer


@dataclass(frozen=True)
class _Experts:
    """A stack of experts that stays where it is, and whose matrices are fetched to a device."""

    residence: Residence
    stack: torch.Tensor
    device: torch.device

    def fetch(self, expert: int) -> Callable[[], torch.Tensor]:
        """Begin to fetch one; gives the function that waits for it."""
        wait = self.residence.fetch(self.stack, slice(expert, expert + 1), self.device)
        return lambda: wait()[0]


def bytes_brought(block: nn.Module, room: int) -> int:
    """Bytes of a block on a device with `room` bytes: without its experts but one, if these are brought one by one."""
    apart = _brought_one_by_one(block, room)
    return sum(
        parameter.nbytes // (len(parameter) if id(parameter) in apart else 1) for parameter in block.parameters()
    )


def _brought_one_by_one(block: nn.Module, room: int | None) -> frozenset[int]:
    """The ids of the block's stacks of experts, if it is too large to be brought whole, or else of none."""
    whole = room is None or 2 * bytes_of(block.parameters()) <= room * BLOCKS_SHARE
    return frozenset() if whole else frozenset(map(id, stacks(block)))


@dataclass(frozen=True)
class _Part:
    """Some modules of the model, and the devices that compute them."""

    module: nn.Module
    modules: list[nn.Module]  # whose weights are brought to the devices
    devices: list[torch.device]
    needed: frozenset[int] | None = None  # the ids of parameters on disk whose values are needed; None: all
    apart: frozenset[int] = frozenset()  # the ids of the stacks whose experts are brought one by one

    def needs(self, tensor: torch.Tensor) -> bool:
        """Whether the values of a tensor are needed."""
        return self.needed is None or id(tensor) in self.needed or not is_offloaded(tensor)

    def tensors(self) -> list[tuple[torch.Tensor, list[_Place]]]:
        """The parameters and buffers that are not on all of the devices, each once, with their places."""
        places: dict[int, tuple[torch.Tensor, list[_Place]]] = {}
        for place, tensor in _tensors(self.modules):
            if any(tensor.device != device for device in self.devices):
                places.setdefault(id(tensor), (tensor, []))[1].append(place)
        return list(places.values())


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
