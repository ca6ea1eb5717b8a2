"""Copies between the host and a GPU, beside what the GPU computes.

They go through page-locked memory, which is the faster way by 5 to 10 times in both directions (measured on an H200 machine).
"""

from typing import Any

import torch


def now(device: torch.device) -> Any:
    """An event after what the GPU was given to compute until now; None for the CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


class Transfer:
    """A CUDA stream for copies to or from one GPU, for one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pinned = torch.empty(0, dtype=torch.uint8)

    def to_host(self, tensor: torch.Tensor, computed: Any) -> torch.Tensor:
        """A copy on the host, of what is there after the event `computed`. Returns when it is there."""
        pinned = self._pinned_like(tensor)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(computed)
            tensor.record_stream(self._stream)
            pinned.copy_(tensor, non_blocking=True)
        self._stream.synchronize()
        return pinned.clone()

    def to_gpu(self, tensor: torch.Tensor, into: torch.Tensor, free: Any) -> torch.Tensor:
        """Copy to `into`, on the GPU, in its type; nothing uses it after the event `free`. Returns when the copy is there."""
        pinned = self._pinned_like(into).copy_(tensor)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            into.copy_(pinned, non_blocking=True)
        self._stream.synchronize()
        return into

    def _pinned_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Page-locked memory for the tensor's values."""
        if self._pinned.numel() < tensor.nbytes:
            self._pinned = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)
        return self._pinned[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
