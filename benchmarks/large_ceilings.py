"""What bounds the gradients of large_model.py on this machine: the rates of matrix products and of reading blocks' files."""

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

_READERS = 4


def drop_page_cache() -> None:
    """Let the next reader go to the disk."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def ceilings(device: str, dtype: str, files: list[Path], *, cold: bool) -> dict[str, float]:
    """FLOP/s of a matrix product, and bytes/s from blocks' files to the host's memory, four at a time."""
    kind, size = getattr(torch, dtype), 8192 if device.startswith("cuda") else 2048
    one, other = (torch.randn(size, size, device=device, dtype=torch.float32).to(kind) for _ in range(2))

    def product() -> None:
        _ = one @ other
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    return {
        "product_flops": 2 * size**3 / statistics.median(_seconds(product) for _ in range(5)),
        "read_bytes_per_s": max(_reading(files, cold=cold) for _ in range(3)),
    }


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _reading(files: list[Path], *, cold: bool) -> float:
    if cold:
        drop_page_cache()
    with ThreadPoolExecutor(_READERS) as threads:
        seconds = _seconds(lambda: list(threads.map(_read, files)))
    return sum(file.stat().st_size for file in files) / seconds


def _read(file: Path) -> None:
    part = bytearray(2**25)
    with file.open("rb", buffering=0) as content:
        while content.readinto(part):
            pass


def bounds(measured: dict[str, Any], most: dict[str, float], blocks_of_shape: int) -> dict[str, float]:
    """What the slower of both ceilings allows, and how near the run came: all of it, one block, and all blocks of the shape.

    The time of all blocks is a product: the run's, and that of one block there and back for each further block.
    """
    blocks, devices = measured["blocks"], measured["devices"]

    def bound(flop: float, read: float) -> float:
        read_s = read / most["read_bytes_per_s"] if measured["on_disk"] else 0.0
        return max(flop / most["product_flops"] / devices, read_s)

    flop_of_block = measured["flop"] * measured["weights_in_blocks"] / blocks / measured["weights_used"]
    read_of_block = measured["bytes_read"] / blocks
    more = blocks_of_shape - blocks
    block_s = measured["forward_block_s"] + measured["backward_block_s"] if "forward_block_s" in measured else None
    all_s = measured["seconds"] + more * (block_s or measured["seconds"] / blocks)
    bound_s = bound(measured["flop"], measured["bytes_read"])
    all_bound_s = bound(measured["flop"] + more * flop_of_block, measured["bytes_read"] + more * read_of_block)
    result = {
        "bound_s": bound_s,
        "all_blocks_s": all_s,
        "all_blocks_share_of_bound": all_bound_s / all_s,
        "share_of_products": measured["flops"] / most["product_flops"] / devices,
        "share_of_bound": bound_s / measured["seconds"],
    }
    if block_s is not None:
        result["block_share_of_bound"] = bound(flop_of_block, read_of_block) / block_s
    return result
