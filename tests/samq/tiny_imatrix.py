"""An importance matrix of random values, as llama-imatrix writes one."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from samq.gguf.file import read_tensors


def write_tiny_imatrix(
    path: Path,
    source: Path,
    without: Collection[str] = (),
    changed: Mapping[str, Callable[[NDArray, NDArray], NDArray | None]] | None = None,
) -> Path:
    """One for the matrices of the GGUF `source`, but those `without` an entry.

    `changed` maps a tensor to a function of its sums (experts, row length) and its counts (experts, 1), which changes them
    in place or returns other sums.
    """
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 64)
    for name, tensor in read_tensors(source).items():
        if len(tensor.shape) in (2, 3) and name not in without:
            experts = tensor.shape[0] if len(tensor.shape) == 3 else 1
            sums = random.random((experts, tensor.row_length)).astype(np.float32)
            counts = np.ones((experts, 1), np.float32)
            if changed and name in changed:
                other = changed[name](sums, counts)
                sums = sums if other is None else other
            writer.add_tensor(f"{name}.in_sum2", sums)
            writer.add_tensor(f"{name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
