"""Loads a GGUF with its 16-bit weights in 32 bits, so that llama.cpp computes in float32.

llama.cpp rounds activations to F16 before it multiplies them by F16 weights. The server and the evaluation do so too.
Next to a program that computes in float32, such as transformers on a processor, that rounding is a difference of its own.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from samq.errors import SamqError
from samq.gguf.file import open_gguf, read_rows
from samq.gguf.header import copy_metadata
from samq.llamacpp.fit import Room, choose_gpu_share
from samq.llamacpp.runtime import Model

_WIDENED = frozenset({GGMLQuantizationType.F16, GGMLQuantizationType.BF16})


def load_float32(path: Path, room: Callable[[Model], Room]) -> Model:
    """The model of `path` with F16 and BF16 weights in F32; quantized weights stay as they are.

    As many layers are on the GPU as fit there beside a context of `room`.
    The model takes twice the memory, and while it loads as much space in the temporary folder. Raises SamqError if the
    file cannot be loaded, or if there is no room for the copy.
    """
    reader = open_gguf(path)
    with tempfile.TemporaryDirectory(prefix="samq-") as folder:
        copy = Path(folder) / path.name
        try:
            _write(reader, copy)
        except OSError as error:
            raise SamqError(
                f"cannot write a float32 copy of {path} to {folder}: {error.strerror}; set TMPDIR to a folder with room"
            ) from error
        model = Model(copy, gpu_layers=choose_gpu_share(copy, None, room))
    model.path = path
    return model


def _write(reader: GGUFReader, path: Path) -> None:
    """Write the file again with wider weights, a tensor at a time."""
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(path, architecture, endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    copy_metadata(reader, writer)
    for tensor in reader.tensors:
        if tensor.tensor_type in _WIDENED:
            shape = tuple(int(extent) for extent in reversed(tensor.shape))
            writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * int(tensor.n_elements))
        else:
            data = tensor.data
            writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:
        writer.write_tensor_data(read_rows(tensor, slice(None)) if tensor.tensor_type in _WIDENED else tensor.data)
    writer.close()
