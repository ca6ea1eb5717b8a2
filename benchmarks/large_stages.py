"""What each stage of large_model.py takes: seconds, and peaks of GPU memory, of the process and of the disk."""

import contextlib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from samq.llamacpp import gpu

_INTERVAL_S = 0.1


def peak_rss(process: int | str = "self") -> int:
    """Peak resident memory of a process, with mapped pages of files; 0 if it is gone."""
    try:
        match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        match = None
    return 1024 * int(match[1]) if match else 0


def reset_peak_rss() -> None:
    """Begin a new peak, where Linux allows that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Stages:
    """Stage -> its figures.

    `peak_gpu_bytes` is what torch allocated on the GPU with most. `peak_device_bytes` is all memory of the GPUs, as the driver
    (NVML) sees it, less what was in use at the start. CUDA's own share and that of child processes count.
    """

    def __init__(self, folders: list[Path], *, cuda: bool) -> None:
        """`folders` hold all files of the run."""
        self.figures: dict[str, dict[str, Any]] = {}
        self._ballast_bytes = 0  # of GPU memory that is taken so that less is free
        self._peak_before = 0  # of torch's memory, before the ballast was there
        self._folders, self._cuda = folders, cuda
        self._free = sum(gpu.free_gpu_bytes()) if cuda else 0

    @contextmanager
    def of(self, name: str) -> Iterator[dict[str, Any]]:
        """Measure what happens within; more figures may be added to what this gives."""
        figures = self.figures[name] = {}
        reset_peak_rss()
        gpus = range(torch.cuda.device_count()) if self._cuda else range(0)
        self._peak_before = 0
        for number in gpus:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(number)
        end = Event()
        sampler = Thread(target=self._sample, args=(figures, end), daemon=True)
        sampler.start()
        started = time.perf_counter()
        try:
            yield figures
            for number in gpus:
                torch.cuda.synchronize(number)
        finally:
            seconds = time.perf_counter() - started
            end.set()
            sampler.join()
        if self._cuda:
            figures["peak_gpu_bytes"] = max(self._peak_before, self._peak_of_torch())
        figures |= {"seconds": seconds, "disk_bytes": self._disk_bytes(), "peak_rss_bytes": peak_rss()}
        peak = max(figures.get("peak_gpu_bytes", 0), figures.get("peak_device_bytes", 0))
        on_gpu = f", {peak / 2**30:.2f} GiB of the GPU" if self._cuda else ""
        rss, disk = figures["peak_rss_bytes"] / 2**30, figures["disk_peak_bytes"] / 1e9
        print(f"{name:26} {seconds:.1f} s{on_gpu}, {rss:.2f} GiB of memory, {disk:.1f} GB on disk", flush=True)

    @contextmanager
    def leaving(self, limit: int | None) -> Iterator[None]:
        """Leave other programs as much of the GPU as one of `limit` bytes would have beside torch; None: all that is free."""
        if limit is None or not self._cuda:
            yield
            return
        self._peak_before = max(self._peak_before, self._peak_of_torch())
        torch.cuda.empty_cache()
        self._ballast_bytes = max(0, torch.cuda.mem_get_info()[0] - (limit - torch.cuda.memory_reserved()))
        ballast = torch.empty(self._ballast_bytes, dtype=torch.uint8, device="cuda")
        try:
            yield
        finally:
            del ballast
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._ballast_bytes = 0

    def _peak_of_torch(self) -> int:
        return max(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))

    def most(self, figure: str) -> int | None:
        """The largest value of a figure over all stages; None if no stage has it."""
        return max((figures[figure] for figures in self.figures.values() if figure in figures), default=None)

    def _sample(self, figures: dict[str, Any], end: Event) -> None:
        figures["disk_peak_bytes"] = 0
        while True:
            figures["disk_peak_bytes"] = max(figures["disk_peak_bytes"], self._disk_bytes())
            if self._cuda and (free := gpu.free_gpu_bytes()):
                used = self._free - sum(free) - self._ballast_bytes
                figures["peak_device_bytes"] = max(figures.get("peak_device_bytes", 0), used)
            if end.wait(_INTERVAL_S):
                return

    def _disk_bytes(self) -> int:
        total = 0
        for file in chain.from_iterable(folder.rglob("*") for folder in self._folders):
            with contextlib.suppress(FileNotFoundError):
                total += file.stat().st_size if file.is_file() else 0
        return total
