"""Memory: what a candidate needs on a GPU, as llama.cpp works it out.

Nothing is allocated: llama.cpp plans a model and a context without memory (`no_alloc`, which its own --fit uses) and
logs what they would need, so a model can be judged that this machine could not hold. The plan is for all layers on
the GPU and one sequence that asks for one token's logits at a time, as when serving. The driver's own share (a CUDA
context: some hundred MB a process) is not in it.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from samq.errors import SamqError
from samq.gguf.file import read_tensors
from samq.llamacpp.runtime import Model, captured_log
from samq.records import Metric

_MIB = 1024 * 1024
# `llama_kv_cache: size =   90.00 MiB (  4096 cells, ...`, and alike for recurrent states; one line for each cache
_CACHE = re.compile(r"^llama_(?:kv_cache|memory|dsv4)\w*: .*(?<!buffer )\bsize = +([\d.]+) MiB")
# `sched_reserve:      CUDA0 compute buffer size =   98.25 MiB`; one line for each device
_COMPUTE = re.compile(r"^\w+: +(\S+) compute buffer size = +([\d.]+) MiB")
# llama.cpp keeps the input layer's tables in host memory (llama-model.cpp, "assign the input layer")
_HOST_TENSORS = ("position_embd.weight", "token_types.weight", "per_layer_token_embd.weight")


def predict_memory(
    gguf: Path, context_tokens: int, *, kv_type: str = "F16", gpu_layers: int | None = None, threads: int | None = None
) -> dict[str, Metric]:
    """Bytes of the file, and of weights, KV cache and compute buffers at a context of so many tokens: `memory/...`.

    Weights are exact; the other two are as precise as llama.cpp's log, 0.01 MiB a line. Raises SamqError if llama.cpp
    cannot load the file, or if its log does not say what is looked for.
    """
    weights = weights_on_gpu(gguf)
    with (
        captured_log() as log,
        Model(gguf, gpu_layers=gpu_layers, allocate=False) as model,
        model.context(context_tokens, outputs=1, kv_type=kv_type, threads=threads),
    ):
        cache, compute = read_plan(log())
    values = {
        "file_bytes": gguf.stat().st_size,
        "weights_bytes": weights,
        "kv_cache_bytes": cache,
        "compute_buffer_bytes": compute,
        "predicted_vram_bytes": weights + cache + compute,
    }
    return {f"memory/{name}": Metric(value=value) for name, value in values.items()}


def weights_on_gpu(gguf: Path) -> int:
    """Bytes of the tensors that a GPU holds when all layers are on it.

    The token embedding is not among them, unless it is the output matrix as well: llama.cpp then puts a copy there.
    """
    tensors = read_tensors(gguf)
    on_host = set(_HOST_TENSORS)
    if "output.weight" in tensors:
        on_host.add("token_embd.weight")
    return sum(tensor.bytes for name, tensor in tensors.items() if name not in on_host)


def read_plan(log: Sequence[str]) -> tuple[int, int]:
    """Bytes of the KV cache and of the compute buffers, from llama.cpp's log of making a context.

    Compute buffers are those of the GPUs; on a machine without, the processor's stand in for them. Raises SamqError if
    the log lacks a line.
    """
    caches = [float(match[1]) for line in log if (match := _CACHE.search(line))]
    buffers = [(match[1], float(match[2])) for line in log if (match := _COMPUTE.search(line))]
    for found, what in ((caches, "KV cache"), (buffers, "compute buffer")):
        if not found:
            raise SamqError(f"llama.cpp's log does not give the size of the {what}; this version writes another log")
    on_gpu = [size for name, size in buffers if name != "CPU" and not name.endswith("_Host")]
    return round(sum(caches) * _MIB), round(sum(on_gpu or [size for _, size in buffers]) * _MIB)
