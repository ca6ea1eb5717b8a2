"""Weights that are not where they are computed with: on disk, or in the host's memory beside a GPU.

A parameter on disk is on torch's meta device, and `keep_on_disk` notes in it where its values are. A block's weights are
brought to the device for as long as it runs, and those of the next one meanwhile, by other threads. What is around the blocks
runs twice: before the first block and after the last. Each time no more weights come than that needs.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import EllipsisType
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import nn

from samq.errors import SamqError
from samq.safetensors_header import read_safetensors_header
from samq.sensitivity.transfer import Transfer, now

logger = logging.getLogger(__name__)

READERS = min(8, len(os.sched_getaffinity(0)))  # threads that read a part's weights
READ_AT_ONCE = 2**25  # bytes of a tensor that a thread reads at a time, whose pages are in memory meanwhile
_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}  # by their names in safetensors
_STORED = "samq_stored"  # attribute of a parameter that is on disk

Rows = slice | EllipsisType  # some rows of a tensor, or all


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, and the type and device that it is computed with."""

    file: Path
    name: str
    dtype: torch.dtype
    device: torch.device

    @contextmanager
    def opened(self, rows: Rows = ...) -> Iterator[torch.Tensor]:
        """Its values as the file has them, whose pages are in memory as long as the tensor."""
        with safe_open(self.file, "pt") as file:
            yield file.get_tensor(self.name) if rows is ... else file.get_slice(self.name)[rows]

    def read(self, into: torch.Tensor, rows: Rows = ...) -> torch.Tensor:
        """Fill a contiguous tensor in the host's memory with its values, or some rows of them; returns that tensor.

        Values that the file has in the tensor's type are read straight into it, and others are converted.
        """
        status = self.file.stat()
        first_byte, entries = _header(self.file, status.st_mtime_ns, status.st_size)
        entry = entries[self.name]
        if _TYPES.get(entry["dtype"]) != into.dtype or not into.is_contiguous():
            with self.opened(rows) as values:
                return into.copy_(values)
        first = rows.start if isinstance(rows, slice) else 0
        of_row = into[0].nbytes if into.ndim and len(into) else 0
        _read_bytes(self.file, first_byte + entry["data_offsets"][0] + first * of_row, into)
        return into

    def has_values_of(self, other: "StoredTensor", parameter: torch.Tensor) -> bool:
        """Whether two tensors of the parameter's shape are equal."""
        if (self.file, self.name) == (other.file, other.name):
            return True
        for rows in parts_of(parameter):
            with self.opened(rows) as values, other.opened(rows) as others:
                if not torch.equal(values.to(self.dtype), others.to(other.dtype)):
                    return False
        return True


@lru_cache(maxsize=1024)
def _header(file: Path, changed_ns: int, size: int) -> tuple[int, dict[str, Any]]:
    """The header of a file that has this time and size: it is read for every part of a tensor."""
    return read_safetensors_header(file)


def _read_bytes(file: Path, offset: int, into: torch.Tensor) -> None:
    """Fill a tensor with the bytes of a file."""
    left = into.reshape(-1).view(torch.uint8).numpy().data
    with file.open("rb", buffering=0) as content:
        content.seek(offset)
        while left:
            count = content.readinto(left)
            if not count:
                raise SamqError(f"{file} became shorter while it was read; download it again, and run again")
            left = left[count:]


def parts_of(tensor: torch.Tensor) -> Iterator[Rows]:
    """The rows of a tensor on disk that are read at a time."""
    step = max(1, READ_AT_ONCE // max(1, tensor[0].nbytes)) if tensor.ndim and len(tensor) else 0
    if tensor.ndim == 0 or len(tensor) <= step:
        yield ...
        return
    for first in range(0, len(tensor), step):
        yield slice(first, min(first + step, len(tensor)))


def keep_on_disk(parameter: nn.Parameter, stored: StoredTensor) -> None:
    """Note where the values of a parameter on the meta device are."""
    setattr(parameter, _STORED, stored)


def is_offloaded(parameter: torch.Tensor) -> bool:
    """Whether the parameter's values are on disk."""
    return hasattr(parameter, _STORED)


def has_offloaded(module: nn.Module) -> bool:
    """Whether some of the module's weights are on disk."""
    return any(map(is_offloaded, module.parameters()))


def stored_of(parameter: torch.Tensor) -> StoredTensor | None:
    """Where the parameter's values are, if that is on disk."""
    stored: StoredTensor | None = getattr(parameter, _STORED, None)
    return stored


def computes_on(parameter: torch.Tensor) -> torch.device:
    """The device where the parameter is, or which its values are brought to from disk."""
    stored = stored_of(parameter)
    return parameter.device if stored is None else stored.device


def values_of(parameter: torch.Tensor) -> torch.Tensor:
    """The parameter's values: read into the host's memory if they are on disk, or else where they are."""
    if (stored := stored_of(parameter)) is None:
        return parameter.detach()
    values = torch.empty(parameter.shape, dtype=stored.dtype)
    for rows in parts_of(parameter):
        stored.read(values[rows], rows)
    return values


def without_values(parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Zeros in the parameter's place, which take no memory."""
    return torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)


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
    others.
    """

    def __init__(
        self, blocks: list[nn.Module], around: nn.Module, devices: list[torch.device], needed: Needed = ALL
    ) -> None:
        """The other modules are those of the model `around`.

        If there is one device, it is for what is on disk, and for blocks in the host's memory. Other parts run where they are.
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
            if not part.needs(original):
                for device in devices:
                    zeros = nn.Parameter(without_values(original, device), requires_grad=False)
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

    def _copy(self, original: torch.Tensor, rows: Rows, copies: list[torch.Tensor], free: list[Any]) -> None:
        """Fill the copies of some rows, which nothing uses after the events `free`; what is on disk is read once."""
        if not copies:
            return
        stored, values = stored_of(original), original.detach()
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
class _Part:
    """Some modules of the model, and the devices that compute them."""

    module: nn.Module
    modules: list[nn.Module]  # whose weights are brought to the devices
    devices: list[torch.device]
    needed: frozenset[int] | None = None  # the ids of parameters on disk whose values are needed; None: all

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


def bytes_of(parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of the parameters' values in the type that they are computed with."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
