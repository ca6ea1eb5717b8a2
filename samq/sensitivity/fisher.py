"""Fisher information of weight matrices, as means over rows and over columns.

The values of single weights would take as much memory as the model. In a linear layer the gradient of one token is the
product of the output's gradient and the input. The expected square of a sequence's gradient is nearly a product too. Its
factors are the sensitivity of a row's output and the size of a column's inputs. F[i, j] is approximated as
rows[i] columns[j] / mean(F), the best approximation of rank one in the generalized Kullback-Leibler divergence (as in
Adafactor: Shazeer and Stern 2018, arXiv:1804.04235, section 3). Means over blocks of a row, however small, do not show
which columns have large inputs. But an importance matrix makes llama-quantize keep its errors away from these columns
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


# An expert that saw fewer calibration tokens is scarce: the standard error of its Fisher information is over an eighth of it.
ENOUGH_TOKENS = 64
EXPERT_GUARD = "Q3_K"  # the default least type of tensors with scarce experts
EXPERT_GUARD_USE = (
    f"least type of stacked experts some of which saw fewer than {ENOUGH_TOKENS} calibration tokens, too few to know what their "
    "rounding costs"
)


@dataclass(frozen=True)
class Routing:
    """Which experts of a mixture of experts the calibration text reached too seldom; a dense model has none."""

    experts: int = 0  # of all blocks together
    scarce: Mapping[str, Mapping[int, int]] = field(default_factory=dict)  # block -> number of an expert -> its tokens

    @property
    def missed(self) -> int:
        """Number of experts without a token."""
        return sum(not tokens for of_block in self.scarce.values() for tokens in of_block.values())

    def __str__(self) -> str:
        """`3 of 16 experts saw fewer than 64 calibration tokens (blk.0: 2 saw none, 5 saw 40; ...)`; at most eight blocks."""
        blocks = [
            f"{block}: " + ", ".join(f"{expert} saw {tokens or 'none'}" for expert, tokens in sorted(experts.items()))
            for block, experts in self.scarce.items()
        ]
        named = "; ".join(blocks[:8]) + ("; ..." if len(blocks) > 8 else "")
        return (
            f"{sum(map(len, self.scarce.values()))} of {self.experts} experts saw fewer than {ENOUGH_TOKENS} calibration tokens"
            + (f" ({named})" if named else "")
        )


def routing(fisher: Mapping[str, Fisher], scarce: Mapping[str, Mapping[int, int]] | None = None) -> Routing:
    """The experts that saw too few tokens: those of the tensors in `scarce`, or else those without a gradient.

    `scarce` maps tensor -> number of an expert -> its tokens (`samq.records.PriceTable`).
    """
    experts = {_block(name): len(tensor.rows) for name, tensor in fisher.items() if is_stacked(name)}
    by_block: dict[str, dict[int, int]] = {}
    for name, of_tensor in (without_gradient(fisher) if scarce is None else scarce).items():
        by_block.setdefault(_block(name), {}).update(of_tensor)
    return Routing(sum(experts.values()), by_block)


def without_gradient(fisher: Mapping[str, Fisher]) -> dict[str, dict[int, int]]:
    """Tensor -> number of an expert -> 0, its tokens, for the experts whose gradients are zero in all tensors of their block."""
    reached: dict[str, NDArray[np.bool_]] = {}
    stacked = {name: tensor.rows.any(axis=1) for name, tensor in fisher.items() if is_stacked(name)}
    for name, here in stacked.items():
        reached[_block(name)] = reached.get(_block(name), np.zeros_like(here)) | here
    unreached = {name: dict.fromkeys(np.flatnonzero(~reached[_block(name)]).tolist(), 0) for name in stacked}
    return {name: experts for name, experts in unreached.items() if experts}


def is_stacked(name: str) -> bool:
    """Whether a tensor of that name holds the matrices of several experts."""
    return "_exps." in name


def _block(name: str) -> str:
    return name.partition(".ffn_")[0]


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
