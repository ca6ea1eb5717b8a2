"""Prediction of the GPU memory that a candidate needs, from llama.cpp's own plan.

llama.cpp plans a model and a context without allocating them (`no_alloc`, which its --fit uses) and logs their sizes. So the
model may be larger than this machine's memory. The plan is for all layers on the GPU. One sequence asks for the logits of one
token at a time, as in serving. It does not include the CUDA context, some hundred MB a process.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from samq.errors import SamqError
from samq.gguf.file import read_tensors
from samq.gguf.formats import EMBEDDING
from samq.llamacpp.runtime import Model, captured_log
from samq.records import Metric

_MIB = 1024 * 1024
# `llama_kv_cache: size =   90.00 MiB (  4096 cells, ...`, and similar for recurrent states; one line a cache
_CACHE = re.compile(r"^llama_(?:kv_cache|memory|dsv4)\w*: .*(?<!buffer )\bsize = +([\d.]+) MiB")
# `sched_reserve:      CUDA0 compute buffer size =   98.25 MiB`; one line a device
_COMPUTE = re.compile(r"^\w+: +(\S+) compute buffer size = +([\d.]+) MiB")
# llama.cpp keeps the tables of the input layer in host memory (llama-model.cpp, "assign the input layer")
_HOST_TENSORS = ("position_embd.weight", "token_types.weight", "per_layer_token_embd.weight")


def predict_memory(
    gguf: Path, context_tokens: int, *, kv_type: str = "F16", gpu_layers: int | None = None, threads: int | None = None
) -> dict[str, Metric]:
    """Bytes of the file, and of weights, KV cache and compute buffers at a context of so many tokens: `memory/...`.

    The weights are exact. The other two are as precise as llama.cpp's log, 0.01 MiB a line. Raises SamqError if llama.cpp
    cannot load the file, or if its log lacks a size.
    """
    weights = weights_on_gpu(gguf)
    with (
        captured_log() as log,
        Model(gguf, gpu_layers=gpu_layers, allocate=False) as model,
        model.context(context_tokens, outputs=1, kv_type=kv_type, threads=threads),
    ):
        cache, compute = read_buffer_bytes(log())
    values = {
        "file_bytes": gguf.stat().st_size,
        "weights_bytes": weights,
        "kv_cache_bytes": cache,
        "compute_buffer_bytes": compute,
        "predicted_vram_bytes": weights + cache + compute,
    }
    return {f"memory/{name}": Metric(value=value) for name, value in values.items()}


def weights_on_gpu(gguf: Path) -> int:
    """Bytes of the tensors that are on the GPU when all layers are.

    The token embedding stays in host memory. If it is the output matrix as well, llama.cpp puts a copy on the GPU.
    """
    tensors = read_tensors(gguf)
    on_host = set(_HOST_TENSORS)
    if "output.weight" in tensors:
        on_host.add(EMBEDDING)
    return sum(tensor.bytes for name, tensor in tensors.items() if name not in on_host)


def read_buffer_bytes(log: Sequence[str]) -> tuple[int, int]:
    """Read the bytes of the KV cache and of the compute buffers from the log that llama.cpp writes for a context.

    The compute buffers are those of the GPUs, or the processor's on a machine without a GPU. Raises SamqError if the log
    lacks a line.
    """
    caches = [float(match[1]) for line in log if (match := _CACHE.search(line))]
    buffers = [(match[1], float(match[2])) for line in log if (match := _COMPUTE.search(line))]
    for sizes, what in ((caches, "KV cache"), (buffers, "compute buffer")):
        if not sizes:
            raise SamqError(
                f"llama.cpp's log does not give the size of the {what}; use the version of llama-cpp-python that SAMQ pins"
            )
    on_gpu = [size for name, size in buffers if name != "CPU" and not name.endswith("_Host")]
    return round(sum(caches) * _MIB), round(sum(on_gpu or [size for _, size in buffers]) * _MIB)
