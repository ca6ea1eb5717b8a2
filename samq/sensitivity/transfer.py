"""Copies between the host and a GPU, beside what the GPU computes."""

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
    """A CUDA stream of its own for copies to and from one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def to_host(self, tensor: torch.Tensor, computed: Any) -> torch.Tensor:
        """A copy on the host, of what is there after the event `computed`. Returns when it is there."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(computed)
            tensor.record_stream(self._stream)
            return tensor.to("cpu")

    def to_gpu(self, tensor: torch.Tensor, into: torch.Tensor, free: Any) -> torch.Tensor:
        """Copy to `into`, on the GPU, which nothing uses after the event `free`. Returns when it is there."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(free)
            into.copy_(tensor, non_blocking=tensor.is_pinned())
        self._stream.synchronize()
        return into
