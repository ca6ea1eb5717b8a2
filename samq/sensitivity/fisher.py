"""Fisher information of weight matrices, as means over rows and over columns.

The values of single weights would take as much memory as the model. In a linear layer the gradient of one token is the
product of the output's gradient and the input. The expected square of a sequence's gradient is nearly a product too: of
the sensitivity of a row's output and the size of a column's inputs. F[i, j] is approximated as
rows[i] columns[j] / mean(F), the best approximation of rank one in the generalized Kullback-Leibler divergence (as in
Adafactor: Shazeer and Stern 2018, arXiv:1804.04235, section 3). Means over blocks of a row, however small, do not show
which columns have large inputs, and an importance matrix makes llama-quantize keep its errors away from these columns
(benchmarks/fisher_grain.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from samq.errors import SamqError

_PARTS = ("rows", "columns")


@dataclass(frozen=True)
class Fisher:
    """Fisher information of one weight matrix, or a stack of experts' matrices, in nats per token per squared weight."""

    rows: NDArray[np.float32]  # (rows,), mean of each row; experts first if stacked
    columns: NDArray[np.float32]  # (row length,), mean of each column; experts first if stacked

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weights: (rows, row length), experts first if stacked."""
        return (*self.rows.shape, self.columns.shape[-1])

    def profile(self) -> NDArray[np.float32]:
        """Each column relative to the mean of all, in the shape of `columns`: the factor on a row's mean. Ones if all are 0."""
        mean = self.columns.mean(axis=-1, keepdims=True, dtype=np.float64)
        ratios: NDArray[np.float64] = np.ones_like(self.columns, np.float64)
        np.divide(self.columns, mean, out=ratios, where=mean > 0)
        return ratios.astype(np.float32)

    def mixed(self, share: float, other: "Fisher", other_share: float) -> "Fisher":
        """The Fisher information over the sequences of two measurements, each with its share of the tokens."""
        return Fisher(
            self.rows * np.float32(share) + other.rows * np.float32(other_share),
            self.columns * np.float32(share) + other.columns * np.float32(other_share),
        )


@dataclass(frozen=True)
class Routing:
    """Which experts of a mixture of experts the calibration text reached; a dense model has none."""

    experts: int = 0  # of all blocks together
    unreached: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # block -> numbers of its experts

    @property
    def missed(self) -> int:
        """Number of experts without a token."""
        return sum(map(len, self.unreached.values()))

    def __str__(self) -> str:
        """`3 of 16 experts saw no calibration token (blk.0: 2, 5; blk.1: 7)`, with at most eight blocks named."""
        blocks = [f"{block}: {', '.join(map(str, experts))}" for block, experts in self.unreached.items()]
        named = "; ".join(blocks[:8]) + ("; ..." if len(blocks) > 8 else "")
        return f"{self.missed} of {self.experts} experts saw no calibration token" + (f" ({named})" if named else "")


def routing(fisher: Mapping[str, Fisher]) -> Routing:
    """Read off the Fisher information which experts saw no token: their gradients are zero in all tensors of their block."""
    reached: dict[str, NDArray[np.bool_]] = {}
    for name, tensor in fisher.items():
        if "_exps." in name:
            block, here = name.partition(".ffn_")[0], tensor.rows.any(axis=1)
            reached[block] = reached.get(block, np.zeros_like(here)) | here
    unreached = {block: tuple(np.flatnonzero(~here).tolist()) for block, here in reached.items() if not here.all()}
    return Routing(sum(map(len, reached.values())), unreached)


def save_fisher(path: Path, fisher: Mapping[str, Fisher]) -> Path:
    """Write GGUF name -> Fisher information as safetensors, and return the path. The same values give the same bytes."""
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
            f"{path} does not hold Fisher information of this version ({error} is missing); calibrate again"
        ) from error
