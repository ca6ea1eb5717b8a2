"""Sequences that are split over devices, which run the same block at the same time.

A GPU is told what to compute faster than it computes, so one thread keeps several at work, a batch each in turn. A thread for
each would need modules and hooks of its own. Sharing the sequences leaves no device idle, as a pipeline does at its ends, and
a block's weights are few against the memory. What has to wait for its device, as experts that run one by one do, gains little.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
RUNS = 8  # that sums too large to be kept for each batch are made of; no more devices share them


def shares(items: Sequence[T], devices: int) -> list[Sequence[T]]:
    """Runs of the items, in order and about as long as each other, one for each device; with few items the last are empty."""
    used = min(devices, len(items)) or 1
    ends = [len(items) * number // used for number in range(used + 1)]
    return [items[ends[n] : ends[n + 1]] if n < used else items[:0] for n in range(devices)]


def in_turn(queues: Iterable[Iterable[T]]) -> Iterator[tuple[int, T]]:
    """(number of the queue, item): one of each queue, and again, until all are empty."""
    left = dict(enumerate(map(iter, queues)))
    while left:
        for number in list(left):
            try:
                yield number, next(left[number])
            except StopIteration:
                del left[number]


def rounds(items: Sequence[T], devices: int) -> list[list[Sequence[T]]]:
    """Runs of the items in rounds: a run a device and round.

    The runs are the same for any number of devices, and so are sums of a run each that are added up in order.
    """
    runs = [run for run in shares(items, RUNS) if len(run)]
    return [runs[first : first + devices] for first in range(0, len(runs), devices)]


def over_devices(
    work: Callable[[T, torch.device | None], R], items: Sequence[T], devices: Sequence[torch.device]
) -> list[R]:
    """What the work makes of each item, on a device that is free: by a thread a device. With one device, None, where it is."""
    if len(devices) <= 1:
        return [work(item, None) for item in items]
    free: SimpleQueue[torch.device] = SimpleQueue()
    for device in devices:
        free.put(device)

    def run(item: T) -> R:
        device = free.get()
        try:
            return work(item, device)
        finally:
            free.put(device)

    with ThreadPoolExecutor(len(devices), thread_name_prefix="device") as threads:
        return list(threads.map(run, items))
