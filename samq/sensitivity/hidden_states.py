"""What all sequences have between the blocks of a model: hidden states, or gradients with respect to them."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch

from samq.sensitivity.checkpoints import Checkpoints
from samq.sensitivity.transfer import Transfer, now


class HiddenStates:
    """`put` and `get` the states before a block, of a batch: kept on a device, on the host, or on disk."""

    def __init__(self, device: torch.device | None, checkpoints: Checkpoints, name: str = "states") -> None:
        """`device` is where they are kept: the host, or the GPUs that give them; None: among the checkpoints by the name."""
        self._name = name
        self._checkpoints = checkpoints if device is None else None
        self._device = torch.device("cpu") if device is None else device
        self._kept: dict[int, dict[int, Future[torch.Tensor]]] = {}
        self._to_host, self._to_gpu = Transfer(), Transfer()
        self._copying, self._writing = (
            ThreadPoolExecutor(1, thread_name_prefix=f"states-{way}") for way in ("copy", "write")
        )
        self._written: dict[int, Future[None]] = {}

    def __enter__(self) -> Self:
        """Nothing is kept yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait until what was closed is on disk, also after an error: nothing comes into the folder after that."""
        self._copying.shutdown()
        self._writing.shutdown()

    def put(self, block: int, batch: int, states: torch.Tensor) -> None:
        """Keep the states of a batch before a block."""
        states = states.detach()
        kept: Future[torch.Tensor] = Future()
        if states.is_cuda and self._device.type == "cpu":  # by a thread, which waits until they are computed
            kept = self._copying.submit(self._to_host.to_host, states, now(states.device))
        else:
            kept.set_result(states)
        self._kept.setdefault(block, {})[batch] = kept

    def close(self, block: int) -> None:
        """Say that the states of all batches before a block are there: they may go to disk."""
        if self._checkpoints is None:
            return
        if self.has(block):  # from a pass that was killed
            del self._kept[block]
            return
        self._written[block] = self._writing.submit(self._write, block, dict(self._kept[block]))
        for before in [before for before in self._written if before != block]:
            self._written.pop(before).result()
            del self._kept[before]

    def _write(self, block: int, kept: dict[int, "Future[torch.Tensor]"]) -> None:
        assert self._checkpoints is not None
        self._checkpoints.save(self._set(block), {str(batch): states.result() for batch, states in kept.items()})

    def wait(self) -> None:
        """Return when all that was closed is on disk."""
        for written in self._written.values():
            written.result()

    def has(self, block: int) -> bool:
        """Whether the states of all batches before a block are on disk."""
        return self._checkpoints is not None and self._checkpoints.has(self._set(block))

    def get(self, block: int, batch: int, device: torch.device) -> torch.Tensor:
        """The states of a batch before a block, on the device."""
        if block in self._kept:
            states = self._kept[block][batch].result()
        else:
            assert self._checkpoints is not None
            states = self._checkpoints.one(self._set(block), str(batch))
            states = states if device.type == "cuda" else states.clone()  # else the file's pages stay in memory
        if device.type != "cuda" or states.is_cuda:
            return states.to(device)
        into = torch.empty(states.shape, dtype=states.dtype, device=device)
        self._to_gpu.to_gpus(states, [into], [now(device)])
        return into

    def drop(self, block: int) -> None:
        """Forget the states before a block."""
        if block in self._written:
            self._written.pop(block).result()
        self._kept.pop(block, None)
        if self._checkpoints is not None:
            self._checkpoints.drop(self._set(block))

    def _set(self, block: int) -> str:
        return f"{self._name}-{block:04}"
