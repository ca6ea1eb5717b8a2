"""The hidden states of all sequences between the blocks of a model: what a backward pass needs of the forward pass."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from samq.sensitivity.transfer import Transfer, now


class HiddenStates:
    """`put` and `get` the states before a block, of a batch: kept on a device, on the host, or in files of a folder."""

    def __init__(self, place: torch.device | Path) -> None:
        """`place` is a torch device, or a folder, in which there is a file for each block."""
        self._folder = place if isinstance(place, Path) else None
        self._device = torch.device("cpu") if isinstance(place, Path) else place
        self._kept: dict[int, dict[int, Future[torch.Tensor]]] = {}
        self._transfers: dict[tuple[torch.device, str], Transfer] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hidden-states")

    def put(self, block: int, batch: int, states: torch.Tensor) -> None:
        """Keep the states of a batch before a block."""
        states = states.detach()
        kept: Future[torch.Tensor] = Future()
        if states.is_cuda and self._device.type == "cpu":  # by a thread, which waits until they are computed
            transfer = self._transfer(states.device, "out")
            kept = self._thread.submit(transfer.to_host, states, now(states.device))
        else:
            kept.set_result(states.to(self._device))
        self._kept.setdefault(block, {})[batch] = kept

    def close(self, block: int) -> None:
        """Say that the states of all batches before a block are there: they may go to disk."""
        if self._folder is not None:
            states = {str(batch): kept.result().contiguous() for batch, kept in self._kept[block].items()}
            partial = self._file(block).with_suffix(".partial")
            save_file(states, partial)
            partial.replace(self._file(block))
            del self._kept[block]

    def get(self, block: int, batch: int, device: torch.device) -> torch.Tensor:
        """The states of a batch before a block, on the device."""
        if block in self._kept:
            states = self._kept[block][batch].result()
        else:
            with safe_open(self._file(block), "pt") as file:
                states = file.get_tensor(str(batch))
                states = states if device.type == "cuda" else states.clone()  # else the file's pages stay in memory
        if device.type != "cuda" or states.is_cuda:
            return states.to(device)
        into = torch.empty(states.shape, dtype=states.dtype, device=device)
        return self._transfer(device, "in").to_gpu(states, into, now(device))

    def drop(self, block: int) -> None:
        """Forget the states before a block."""
        self._kept.pop(block, None)
        if self._folder is not None:
            self._file(block).unlink(missing_ok=True)

    def _transfer(self, device: torch.device, way: str) -> Transfer:
        if (device, way) not in self._transfers:
            self._transfers[device, way] = Transfer(device)
        return self._transfers[device, way]

    def _file(self, block: int) -> Path:
        assert self._folder is not None
        return self._folder / f"states-{block:04}.safetensors"
