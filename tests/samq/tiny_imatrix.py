"""An importance matrix of random values, as llama-imatrix writes one."""

from collections.abc import Collection
from pathlib import Path

import gguf
import numpy as np

from samq.gguf.file import read_tensors


def write_tiny_imatrix(path: Path, source: Path, without: Collection[str] = ()) -> Path:
    """One for the matrices of the GGUF `source`, but those `without` an entry."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 64)
    for name, tensor in read_tensors(source).items():
        if len(tensor.shape) == 2 and name not in without:
            writer.add_tensor(f"{name}.in_sum2", random.random((1, tensor.row_length)).astype(np.float32))
            writer.add_tensor(f"{name}.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
