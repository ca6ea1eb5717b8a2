"""A Llama GGUF in another basis: other weights that compute the same function.

Weights dequantized from a quantized GGUF lie on its type's grid. That type then costs them nothing, and a sweep over them
shows no trade-off. Three changes take them off the grid, and no output changes:

- The columns that read a norm's output are multiplied by a scale each, and the norm's weights divided by it.
- The rows of `attn_v` are multiplied and the columns of `attn_output` that read them divided; `ffn_up` and `ffn_down` alike.
- The channels of the residual stream get another order. They cannot be scaled, since RMSNorm averages over them; their order
  is all that reaches the embedding.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, LlamaFileType
from numpy.typing import NDArray

from samq.errors import SamqError
from samq.gguf.file import TensorInfo, open_gguf, read_metadata, read_tensors, read_weights
from samq.gguf.formats import EMBEDDING
from samq.gguf.header import copy_metadata

VERSION = 1  # of what is written for the same GGUF
SCALES = (0.8, 1.25)
SEED = 0


@dataclass(frozen=True)
class _Change:
    """What happens to one tensor's channels: their order first, then a factor each. None: nothing."""

    row_order: NDArray[np.intp] | None = None
    column_order: NDArray[np.intp] | None = None
    row_factors: NDArray[np.float64] | None = None
    column_factors: NDArray[np.float64] | None = None

    def apply(self, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """The tensor in the new basis; a vector has columns only."""
        changed = weights.astype(np.float64)
        if self.row_order is not None:
            changed = changed[self.row_order]
        if self.column_order is not None:
            changed = changed[..., self.column_order]
        if self.row_factors is not None:
            changed *= self.row_factors[:, None]
        if self.column_factors is not None:
            changed *= self.column_factors
        return changed.astype(np.float32)


def write_rescaled(gguf: Path, output: Path) -> None:
    """Write the model of a GGUF in another basis: matrices as F16, vectors as F32, the metadata as it is.

    The same GGUF gives the same bytes. Raises SamqError if the model is not a dense Llama.
    """
    weights = rescaled_weights(gguf)
    writer = GGUFWriter(output, "llama")
    copy_metadata(open_gguf(gguf), writer, without=["general.file_type"])  # the tensors have other types here
    writer.add_file_type(LlamaFileType.MOSTLY_F16)
    for name, tensor in weights:
        writer.add_tensor(name, tensor.astype(np.float16 if tensor.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rescaled_weights(gguf: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Name and weights of every tensor in the new basis, in the file's order; raises SamqError if it is not a dense Llama."""
    tensors = read_tensors(gguf)
    try:
        changes = _changes(read_metadata(gguf), tensors)
        known = {name: changes[name] for name in tensors}
    except KeyError as error:
        raise SamqError(
            f"only a dense Llama can be rescaled, and {gguf} differs from one in {error}; use it without rescaled:"
        ) from error
    return ((name, change.apply(read_weights(gguf, name))) for name, change in known.items())


def _changes(metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, _Change]:
    """Name -> change of every tensor that a dense Llama may have; raises KeyError for what another model lacks."""
    heads = metadata["llama.attention.head_count"]
    kv_heads = metadata.get("llama.attention.head_count_kv", heads)
    random = np.random.default_rng(SEED)

    def factors(tensor: str, axis: int) -> NDArray[np.float64]:
        return random.uniform(*SCALES, tensors[tensor].shape[axis])

    order = random.permutation(metadata["llama.embedding_length"])  # of the residual stream
    changes = {
        "rope_freqs.weight": _Change(),
        EMBEDDING: _Change(column_order=order),
        "output_norm.weight": _Change(column_order=order),
        "output.weight": _Change(column_order=order),
    }
    for block in range(metadata["llama.block_count"]):
        stem = f"blk.{block}"
        into_attention, into_ffn = (factors(f"{stem}.{norm}.weight", 0) for norm in ("attn_norm", "ffn_norm"))
        values, hidden = factors(f"{stem}.attn_v.weight", 0), factors(f"{stem}.ffn_up.weight", 0)
        # Query heads that share a head of values read the same channels.
        read_values = values.reshape(kv_heads, -1).repeat(heads // kv_heads, axis=0).ravel()
        changes |= {
            f"{stem}.{name}.weight": change
            for name, change in {
                "attn_norm": _Change(column_order=order, column_factors=1 / into_attention),
                "attn_q": _Change(column_order=order, column_factors=into_attention),
                "attn_k": _Change(column_order=order, column_factors=into_attention),
                "attn_v": _Change(column_order=order, column_factors=into_attention, row_factors=values),
                "attn_output": _Change(row_order=order, column_factors=1 / read_values),
                "ffn_norm": _Change(column_order=order, column_factors=1 / into_ffn),
                "ffn_gate": _Change(column_order=order, column_factors=into_ffn),
                "ffn_up": _Change(column_order=order, column_factors=into_ffn, row_factors=hidden),
                "ffn_down": _Change(row_order=order, column_factors=1 / hidden),
            }.items()
        }
    return changes
