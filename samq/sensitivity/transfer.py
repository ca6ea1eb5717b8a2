"""Copies between the host and GPUs, and from one GPU to others, beside what they compute.

Those of the host go through page-locked memory. That is 5 to 10 times as fast in both directions (measured on an H200
machine).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch


def now(device: torch.device) -> Any:
    """An event after what the GPU was given to compute until now; None for the CPU."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.current_stream(device)
    return stream.record_event()


class Transfer:
    """A CUDA stream on each GPU for copies to and from it, for one thread at a time."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._pinned = torch.empty(0, dtype=torch.uint8)

    def to_host(self, tensor: torch.Tensor, computed: Any) -> torch.Tensor:
        """A copy in page-locked memory, of what is there after the event `computed`. Returns when it is there."""
        pinned, stream = torch.empty_like(tensor, device="cpu", pin_memory=True), self._stream(tensor.device)
        with torch.cuda.stream(stream):
            stream.wait_event(computed)
            tensor.record_stream(stream)
            pinned.copy_(tensor, non_blocking=True)
        stream.synchronize()
        return pinned

    def to_gpus(self, tensor: torch.Tensor, copies: Sequence[torch.Tensor], free: Sequence[Any]) -> None:
        """Fill the copies, each on a GPU, all of one type. Nothing uses a copy after its event in `free`.

        The tensor is read once, on the host or on a GPU, where nothing writes it. Returns when all copies are there.
        """
        if tensor.is_cuda or tensor.is_pinned():
            self._send(tensor, copies, free)
        else:
            self.filled_to_gpus(lambda pinned: pinned.copy_(tensor), copies, free)

    def filled_to_gpus(
        self, fill: Callable[[torch.Tensor], object], copies: Sequence[torch.Tensor], free: Sequence[Any]
    ) -> None:
        """The same with the values that `fill` writes into a tensor in page-locked memory, of the copies' shape and type."""
        pinned = self._pinned_like(copies[0])
        fill(pinned)
        self._send(pinned, copies, free)

    def _send(self, source: torch.Tensor, copies: Sequence[torch.Tensor], free: Sequence[Any]) -> None:
        for copy, event in zip(copies, free, strict=True):
            stream = self._stream(copy.device)
            with ExitStack() as streams:
                if source.is_cuda:  # the copy runs on a stream of the source as well
                    streams.enter_context(torch.cuda.stream(self._stream(source.device)))
                streams.enter_context(torch.cuda.stream(stream))
                stream.wait_event(event)
                copy.copy_(source, non_blocking=True)
        for copy in copies:
            self._stream(copy.device).synchronize()

    def _stream(self, device: torch.device) -> "torch.cuda.Stream":
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def _pinned_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Page-locked memory for the tensor's values."""
        if self._pinned.numel() < tensor.nbytes:
            self._pinned = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)
        return self._pinned[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
