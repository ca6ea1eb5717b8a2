"""What NVIDIA's driver says of the GPUs that this process may use: its memory on them, what is free, and their names."""

import os
from threading import Event, Thread
from typing import Any, Self

import pynvml

_INTERVAL_S = 0.05
NO_NVML = "no NVML: no NVIDIA GPU on this machine"


class MemoryPeak:
    """Samples, in a thread, the GPU memory that this process holds, during a `with` block.

    In a container whose process ids are not the driver's, the driver does not list this process; the increase of all
    memory in use stands in for it then, and is right only while no other process starts or ends on the GPUs.
    """

    def __init__(self) -> None:
        """Look for NVML; without it nothing is sampled."""
        self._devices = _devices()
        self._before = sum(_used(device) for device in self._devices)
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
        """The peak so far, over all GPUs together; None without NVML."""
        return (self._own or self._increase) if self._devices else None

    @property
    def source(self) -> str:
        """What `bytes` is of."""
        return "this process" if self._own else "increase of the whole GPU"

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self._own = max(self._own, sum(_used_by(device, os.getpid()) for device in self._devices))
            self._increase = max(self._increase, sum(_used(device) for device in self._devices) - self._before)


def names() -> list[str]:
    """Names of the NVIDIA GPUs; empty without NVML."""
    return [pynvml.nvmlDeviceGetName(device) for device in _devices()]


def used_bytes() -> int | None:
    """GPU memory that this process holds now, over all GPUs; None without NVML."""
    devices = _devices()
    return sum(_used_by(device, os.getpid()) for device in devices) if devices else None


def free_bytes() -> list[int]:
    """Memory of each GPU that nobody holds now; empty without NVML."""
    return [int(pynvml.nvmlDeviceGetMemoryInfo(device).free) for device in _devices()]


def _devices() -> list[Any]:
    """The GPUs that CUDA programs may use here, as CUDA_VISIBLE_DEVICES has it."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    # CUDA takes those up to the first that does not exist, by index or by UUID.
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
