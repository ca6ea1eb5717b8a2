"""The part of a model that is on GPUs, in the form in which llama.cpp loads it."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import llama_cpp.llama_cpp as api
from llama_cpp._ggml import libggml

from samq.errors import SamqError


class _Override(ctypes.Structure):
    """`struct llama_model_tensor_buft_override` in llama.h, which llama_cpp does not declare."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


@dataclass(frozen=True)
class GpuShare:
    """Layers on GPUs, and tensors of those layers that are elsewhere."""

    layers: int  # -1: all; 0: llama.cpp does not use a GPU at all
    split: tuple[float, ...] = ()  # each GPU's part of these layers; empty: by the GPUs' free memory
    overrides: tuple[tuple[str, str], ...] = ()  # (regular expression of tensors' names, name of a buffer type)

    @classmethod
    def default(cls) -> Self:
        """All layers if this llama.cpp was built for a GPU and finds one; none otherwise."""
        return cls(-1 if api.llama_supports_gpu_offload() else 0)

    def put_into(self, params: Any) -> list[Any]:
        """Set the fields of a `llama_model_params`; returns what must not be freed before the model is loaded.

        Raises SamqError if a buffer type or GPU does not exist here.
        """
        params.n_gpu_layers = self.layers
        kept: list[Any] = []
        if self.layers == 0:  # llama.cpp would still use a GPU for large batches
            kept.append((ctypes.c_void_p * 1)(None))
            params.devices = ctypes.cast(kept[-1], ctypes.c_void_p)
        if self.split:
            most = api.llama_max_devices()
            if len(self.split) > most:
                raise SamqError(f"the layers are split over {len(self.split)} GPUs, but llama.cpp knows {most} at most")
            kept.append((ctypes.c_float * most)(*self.split))
            params.tensor_split = ctypes.cast(kept[-1], ctypes.POINTER(ctypes.c_float))
        if self.overrides:
            types = _buffer_types()
            if unknown := {name for _, name in self.overrides} - types.keys():
                raise SamqError(
                    f"llama.cpp has no buffer type {', '.join(sorted(unknown))} here, but {', '.join(sorted(types))}"
                )
            pairs = [_Override(pattern.encode(), types[name]) for pattern, name in self.overrides]
            kept.append((_Override * (len(pairs) + 1))(*pairs))  # the last one, of zeros, is the end
            params.tensor_buft_overrides = ctypes.cast(kept[-1], ctypes.c_void_p)
        return kept

    def describe(self, layers: int) -> str:
        """`20 of 33`, for a model of so many layers, its output among them."""
        if self.layers == 0:
            return "none"
        text = f"{layers if self.layers < 0 else min(self.layers, layers)} of {layers}"
        return f"{text}, parts of {len(self.overrides)} in host memory" if self.overrides else text


@lru_cache
def _buffer_types() -> Mapping[str, int]:
    """Name -> ggml's handle of each device's buffer type: CPU, CUDA0, ..."""
    libggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    libggml.ggml_backend_dev_get.argtypes = (ctypes.c_size_t,)
    libggml.ggml_backend_buft_name.restype = ctypes.c_char_p
    for function in (libggml.ggml_backend_dev_get, libggml.ggml_backend_dev_buffer_type):
        function.restype = ctypes.c_void_p
    for function in (libggml.ggml_backend_dev_buffer_type, libggml.ggml_backend_buft_name):
        function.argtypes = (ctypes.c_void_p,)
    devices = map(libggml.ggml_backend_dev_get, range(libggml.ggml_backend_dev_count()))
    types = map(libggml.ggml_backend_dev_buffer_type, devices)
    return {libggml.ggml_backend_buft_name(kind).decode(): kind for kind in types}
