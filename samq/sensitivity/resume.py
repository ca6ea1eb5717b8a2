"""Tensors in the files of a folder, from which a computation that was killed goes on."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from samq.errors import SamqError
from samq.output import discard


class Checkpoints:
    """Named sets of tensors, each whole or not there; without a folder nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def has(self, name: str) -> bool:
        """Whether there is such a set."""
        return self.folder is not None and self._file(name).exists()

    def save(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep a set; raises SamqError if it cannot be written."""
        if self.folder is None:
            return
        partial = self._file(name).with_suffix(".partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, partial)
            partial.replace(self._file(name))
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise SamqError(
                f"cannot write {partial}: {error}; free some space, or set SAMQ_HOME to another folder"
            ) from error

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """A set that was kept."""
        tensors: dict[str, torch.Tensor] = load_file(self._file(name))
        return tensors

    def one(self, name: str, key: str) -> torch.Tensor:
        """A tensor of a set; the file's pages stay in memory as long as it."""
        with safe_open(self._file(name), "pt") as file:
            tensor: torch.Tensor = file.get_tensor(key)
            return tensor

    def drop(self, name: str) -> None:
        """Forget a set, if it is there."""
        if self.folder is not None:
            self._file(name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all."""
        if self.folder is not None:
            discard(self.folder)

    def _file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"
