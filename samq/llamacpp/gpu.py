"""The GPUs that this process may use, as NVIDIA's driver reports them: names, free memory, memory of this process."""

import gc
import os
import sys
from threading import Event, Thread
from typing import Any, Self

import pynvml

_INTERVAL_S = 0.05
NO_NVML = "no NVML: no NVIDIA GPU on this machine"


class MemoryPeak:
    """Sample the GPU memory of this process in a thread, for the time of a `with` block.

    The driver does not list this process where a container has process ids of its own. The increase of all memory in
    use replaces it there; that is right only while no other process starts or ends on the GPUs.
    """

    def __init__(self) -> None:
        """Look for NVML, without which nothing is sampled."""
        self._devices = _devices()
        self._before, self._own_before = self._used()
        self._own = 0
        self._increase = 0
        self._stop = Event()
        self._thread = Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        """Start sampling."""
        if self._devices:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop sampling."""
        self._stop.set()
        if self._devices:
            self._thread.join()

    @property
    def bytes(self) -> int | None:
        """The peak so far in bytes, of all GPUs together; None without NVML."""
        return (self._own or self._increase) if self._devices else None

    def growth_now(self) -> int | None:
        """Bytes in use now beyond those in use at the start, of all GPUs together; None without NVML."""
        used, own = self._used()
        return (own - self._own_before if own else used - self._before) if self._devices else None

    @property
    def source(self) -> str:
        """What `bytes` measures."""
        return "this process" if self._own else "increase of the whole GPU"

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            used, own = self._used()
            self._own = max(self._own, own)
            self._increase = max(self._increase, used - self._before)

    def _used(self) -> tuple[int, int]:
        """Bytes in use now, by all processes and by this one."""
        own = sum(_used_by(device, os.getpid()) for device in self._devices)
        return sum(_used(device) for device in self._devices), own


def release_torch_cache() -> None:
    """Give the GPUs back what torch, if this process uses it, keeps for its next tensors: another process needs it now."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def names() -> list[str]:
    """The names of the NVIDIA GPUs; empty without NVML."""
    return [pynvml.nvmlDeviceGetName(device) for device in _devices()]


def used_bytes(pid: int | None = None) -> int | None:
    """Bytes of GPU memory that a process, or this one, uses now, on all GPUs together; None without NVML."""
    devices = _devices()
    return sum(_used_by(device, pid or os.getpid()) for device in devices) if devices else None


def free_gpu_bytes() -> list[int]:
    """Free bytes of each GPU; empty without NVML."""
    return [int(pynvml.nvmlDeviceGetMemoryInfo(device).free) for device in _devices()]


def _devices() -> list[Any]:
    """Handles of the GPUs that CUDA_VISIBLE_DEVICES lets CUDA programs use."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    # CUDA takes the names in the list, indices or UUIDs, up to the first that does not exist.
    devices = []
    for name in filter(None, map(str.strip, visible.split(","))):
        try:
            devices.append(
                pynvml.nvmlDeviceGetHandleByIndex(int(name))
                if name.isdigit()
                else pynvml.nvmlDeviceGetHandleByUUID(name)
            )
        except pynvml.NVMLError:
            break
    return devices


def _used(device: Any) -> int:
    return int(pynvml.nvmlDeviceGetMemoryInfo(device).used)


def _used_by(device: Any, pid: int) -> int:
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(device)
    return sum(process.usedGpuMemory or 0 for process in processes if process.pid == pid)
