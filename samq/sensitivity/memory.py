"""Devices that measure and their memory, and one sentence instead of torch's traceback where a GPU's does not suffice."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from samq.errors import SamqError

_SHARE = 3  # hidden states get this part of what is free
# Bytes of an array that is a mapping of its own, and bytes that malloc keeps free at the end of a heap.
_RETURNED = 2**21, 2**21
_REUSED = 2**24, 2**26
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


@dataclass(frozen=True)
class Memory:
    """What a measurement may use."""

    limit_bytes: int | None = None  # of each device that computes; None: what is free there
    folder: Path | None = None  # for what memory does not hold, and what a killed run goes on from
    devices: tuple[torch.device, ...] = ()  # that share the sequences, where these go through a block at a time

    def sharing(self, main: torch.device) -> list[torch.device]:
        """The devices that share the sequences, first the model's main one; that alone if no others are given."""
        others = list(self.devices)
        if main in others:
            others.remove(main)
        return [main, *others] if len(self.devices) > 1 else [main]

    def place(self, size: int, devices: list[torch.device], *, offloaded: bool) -> torch.device | None:
        """Where `size` bytes of hidden states are kept: on a device, or, if None, in the folder.

        They stay on the GPUs that compute them, for which the first GPU stands, if the whole model is on GPUs and they fit.
        What takes longer than that can go on from the folder.
        """
        fits = all(
            device.type == "cuda" and size * _SHARE <= len(devices) * free_bytes(device, self.limit_bytes)
            for device in devices
        )
        if fits and not offloaded:
            return devices[0]
        return torch.device("cpu") if self.folder is None else None


UNLIMITED = Memory()  # what is free


# Matrices of many sizes come and go. In segments of fixed sizes what is free falls to pieces: 8 GiB of 32 on a 70B model.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before torch's first allocation on a GPU


def compute_device(device: str) -> str:
    """The torch device for work without a model: for `auto` the first GPU, or the CPU if there is none."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def compute_devices(device: str) -> tuple[torch.device, ...]:
    """The torch devices that share the sequences of a pass: for `auto` all GPUs, or the CPU if there is none."""
    if device == "auto" and torch.cuda.is_available():
        return tuple(torch.device("cuda", number) for number in range(torch.cuda.device_count()))
    return (torch.device(compute_device(device)),)


def free_bytes(device: torch.device, limit: int | None = None) -> int:
    """Bytes that are free on the device, or of `limit`, with what torch has there already."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available) if limit is None else limit
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + reserved
    return free if limit is None else min(free, limit - torch.cuda.memory_allocated(device))


@contextmanager
def needs_gpu_memory(what: str, advice: str) -> Iterator[None]:
    """Raise SamqError if torch runs out of GPU memory: `what` does not fit, and `advice` says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SamqError(f"the GPU's memory does not hold {what}; {advice}") from error


def return_freed_memory() -> None:
    """Let malloc return what is free now, and from now on each large array when it is freed, where the C library is glibc.

    By itself glibc keeps arrays of up to 32 MiB for later ones. On a processor that was 0.2 GiB of a backward pass and 0.7 of
    compensated rounding, with 0.5 billion weights on disk.
    """
    _set_malloc(*_RETURNED)


@contextmanager
def reusing_freed_memory() -> Iterator[None]:
    """Let malloc keep freed arrays of up to 16 MiB for the next ones meanwhile, and then return them.

    A backward pass allocates the same sizes for each sequence. Fresh pages each time took a sixth of it on a processor.
    """
    _set_malloc(*_REUSED)
    try:
        yield
    finally:
        return_freed_memory()


def _set_malloc(mapped: int, kept: int) -> None:
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.mallopt(_M_MMAP_THRESHOLD, mapped)
        library.mallopt(_M_TRIM_THRESHOLD, kept)
        library.malloc_trim(0)
