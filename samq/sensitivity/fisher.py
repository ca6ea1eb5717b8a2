"""Fisher information of weight matrices, as means over rows and over columns.

The values of single weights take as much room as the model. Of a linear layer, the gradient of one token is the product
of the output's gradient and the input, so the expected square of a sequence's is nearly a product, too: what a row's
output matters, times how large a column's inputs are. F[i, j] is taken as rows[i] columns[j] / mean(F), the best
approximation of rank one in the generalized Kullback-Leibler divergence (as in Adafactor: Shazeer and Stern 2018,
arXiv:1804.04235, section 3). Means over blocks of a row, however small, do not know which columns have large inputs;
an importance matrix makes llama-quantize keep its errors away from just those (benchmarks/fisher_grain.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from samq.errors import SamqError

_PARTS = ("rows", "columns")


@dataclass(frozen=True)
class Fisher:
    """Of one weight matrix, or of a stack of experts' matrices, in nats per token per squared weight."""

    rows: NDArray[np.float32]  # (rows,), means over each row; experts first when stacked
    columns: NDArray[np.float32]  # (row length,), means over each column; experts first when stacked

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weights: (rows, row length), experts first when stacked."""
        return (*self.rows.shape, self.columns.shape[-1])

    def profile(self) -> NDArray[np.float32]:
        """The columns over their mean, of `columns`' shape: what a row's mean is multiplied by. Ones if all are zero."""
        mean = self.columns.mean(axis=-1, keepdims=True, dtype=np.float64)
        ratios: NDArray[np.float64] = np.ones_like(self.columns, np.float64)
        np.divide(self.columns, mean, out=ratios, where=mean > 0)
        return ratios.astype(np.float32)

    def mixed(self, share: float, other: "Fisher", other_share: float) -> "Fisher":
        """Of two measurements' sequences together, each with its share of the tokens."""
        return Fisher(
            self.rows * np.float32(share) + other.rows * np.float32(other_share),
            self.columns * np.float32(share) + other.columns * np.float32(other_share),
        )


def save_fisher(path: Path, fisher: Mapping[str, Fisher]) -> Path:
    """Write GGUF name -> Fisher information as safetensors: the same values give the same bytes."""
    parts = {f"{name}.{part}": getattr(fisher[name], part) for name in sorted(fisher) for part in _PARTS}
    try:
        save_file({name: np.ascontiguousarray(values) for name, values in parts.items()}, path)
    except (OSError, SafetensorError) as error:
        raise SamqError(f"cannot write {path}: {error}; choose a folder that can be written to") from error
    return path


def load_fisher(path: Path) -> dict[str, Fisher]:
    """Read what `save_fisher` wrote; raises SamqError if the file is missing, damaged or of another kind."""
    try:
        parts = load_file(path)
        names = dict.fromkeys(key.rpartition(".")[0] for key in parts)
        return {name: Fisher(*(parts[f"{name}.{part}"] for part in _PARTS)) for name in names}
    except (OSError, SafetensorError) as error:
        raise SamqError(f"cannot read Fisher information from {path}: {error}; calibrate again") from error
    except KeyError as error:
        raise SamqError(
            f"{path} is no Fisher information of this version ({error} is missing); calibrate again"
        ) from error
