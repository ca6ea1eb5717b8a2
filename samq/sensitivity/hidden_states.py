"""The hidden states of all sequences between the blocks of a model: what a backward pass needs of the forward pass."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


class HiddenStates:
    """`put` and `get` the states before a block, of a batch: kept on a device, on the host, or in files of a folder."""

    def __init__(self, place: torch.device | Path) -> None:
        """`place` is a torch device, or a folder, in which there is a file for each block."""
        self._place = place
        self._kept: dict[int, dict[int, torch.Tensor]] = {}

    def put(self, block: int, batch: int, states: torch.Tensor) -> None:
        """Keep the states of a batch before a block."""
        device = torch.device("cpu") if isinstance(self._place, Path) else self._place
        states = states.detach()
        if states.is_cuda and device.type == "cpu":
            pinned = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
            states = pinned.copy_(states, non_blocking=True)
        self._kept.setdefault(block, {})[batch] = states.to(device)

    def close(self, block: int) -> None:
        """Say that the states of all batches before a block are there: they may go to disk."""
        if isinstance(self._place, Path):
            states = self._kept.pop(block)
            torch.cuda.synchronize() if torch.cuda.is_available() else None
            partial = self._file(block).with_suffix(".partial")
            save_file({str(batch): tensor.contiguous() for batch, tensor in states.items()}, partial)
            partial.replace(self._file(block))

    def get(self, block: int, batch: int, device: torch.device) -> torch.Tensor:
        """The states of a batch before a block, on the device."""
        if block in self._kept:
            return self._kept[block][batch].to(device, non_blocking=True)
        with safe_open(self._file(block), "pt") as file:
            tensor: torch.Tensor = file.get_tensor(str(batch))
            return tensor.to(device, copy=True)

    def drop(self, block: int) -> None:
        """Forget the states before a block."""
        self._kept.pop(block, None)
        if isinstance(self._place, Path):
            self._file(block).unlink(missing_ok=True)

    def _file(self, block: int) -> Path:
        assert isinstance(self._place, Path)
        return self._place / f"states-{block:04}.safetensors"
