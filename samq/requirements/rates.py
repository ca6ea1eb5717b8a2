"""What this machine does in a second, measured in a few seconds: products, copies, rounding, the disk, hashes."""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType

from samq.errors import SamqError
from samq.gguf.ggml import quantize_rows
from samq.llamacpp.gpu_share import GpuShare
from samq.progress import Progress, silent

_FILE_BYTES = 2**26  # written and read, or less of a disk that is almost full
_SIDE = {"cuda": 4096, "cpu": 1024}  # of the matrices that are multiplied
_COPY_BYTES = 2**26
_ROUNDED = (64, 1024)  # rows and row length; so few are rounded by one thread


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second."""

    products: dict[str, float]  # torch's type -> floating-point operations, on the device that torch computes on
    host_products: float  # in float32, by the processor
    host_bytes: float  # of memory read
    gpu_bytes: float | None  # of the GPU's memory that llama.cpp reads; None: it runs on the processor
    write_bytes: float  # to the disk of the store
    read_bytes: float  # from it
    hash_bytes: float  # by one thread
    rounding: dict[str, float]  # type -> weights


def measure_rates(
    folder: Path, device: torch.device, dtype: str, types: Collection[str], progress: Progress = silent
) -> Rates:
    """Measure what this machine does in a second.

    Args:
        folder: a file is written there, and deleted.
        device: that torch computes on.
        dtype: torch's type of the model.
        types: that weights are rounded to.
        progress: told of the measurements that are done.

    Raises:
        SamqError: `folder` cannot be written to.
    """
    steps, done = 5 + len(types), iter(range(1, 99))
    content = np.random.default_rng(0).bytes(_FILE_BYTES)

    def told(value: float) -> float:
        progress(min(next(done), steps), steps)
        return value

    write, read = _disk(folder, content)
    told(0)
    products = {name: _products(device, getattr(torch, name)) for name in {dtype, "float32", "float64"}}
    told(0)
    on_gpu = GpuShare.default().layers != 0 and torch.cuda.is_available()
    return Rates(
        products=products,
        host_products=told(_products(torch.device("cpu"), torch.float32)),
        host_bytes=told(_copies(torch.device("cpu"))),
        gpu_bytes=_copies(torch.device("cuda")) if on_gpu else None,
        write_bytes=write,
        read_bytes=read,
        hash_bytes=told(_FILE_BYTES / _seconds(lambda: hashlib.sha256(content), times=1)),
        rounding={kind: told(_rounding(kind)) for kind in sorted(types)},
    )


def _seconds(work: Callable[[], object], times: int = 2) -> float:
    """The shortest of some runs."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return max(min(taken), 1e-9)


def _synchronized(device: torch.device, work: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def _products(device: torch.device, dtype: torch.dtype) -> float:
    side = _SIDE[device.type] // (2 if dtype == torch.float64 or (device.type == "cpu" and dtype.itemsize == 2) else 1)
    one, other = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    run = _synchronized(device, lambda: one @ other)
    run()  # loads the library
    return 2 * side**3 / _seconds(run)


def _copies(device: torch.device) -> float:
    source, target = (torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * _COPY_BYTES / _seconds(_synchronized(device, lambda: target.copy_(source)))  # it is read and written


def _rounding(kind: str) -> float:
    weights = np.random.default_rng(0).standard_normal(_ROUNDED, np.float32)
    importance = np.ones(weights.shape[1], np.float32)

    def of_rows(rows: int) -> None:
        quantize_rows(GGMLQuantizationType[kind], weights[:rows], importance)

    of_rows(1)  # ggml makes the type's tables
    return len(os.sched_getaffinity(0)) * weights.size / _seconds(lambda: of_rows(len(weights)), times=1)


def _disk(folder: Path, content: bytes) -> tuple[float, float]:
    """Bytes a second that are written to the disk itself, and read from it."""
    try:
        content = content[: max(2**16, shutil.disk_usage(folder).free // 4)]
        with tempfile.NamedTemporaryFile(dir=folder) as file:

            def write() -> None:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

            written = _seconds(write, times=1)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # the pages are clean, so they go
            started = time.perf_counter()
            with open(file.name, "rb", buffering=0) as again:
                while again.read(2**22):
                    pass
            read = max(time.perf_counter() - started, 1e-9)
    except OSError as error:
        raise SamqError(f"cannot write to {folder}: {error.strerror}; set SAMQ_HOME to a folder of your own") from error
    return len(content) / written, len(content) / read
