"""Whether a model takes the GPU memory that was predicted for it: the plan of llama.cpp against what the driver sees.

Both are of the layers that are on the GPUs, and of one sequence of `vram_context_tokens`. CUDA's own share, some hundred MB a
process, is in neither: it is taken before.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from samq.errors import SamqError
from samq.evaluation.metrics import VRAM
from samq.evaluation.settings import EvaluationSettings
from samq.llamacpp import gpu
from samq.llamacpp.fit import SPARE_BYTES, Room, planned_gpu_bytes
from samq.llamacpp.gpu_share import GpuShare
from samq.llamacpp.runtime import PHYSICAL_BATCH_TOKENS, Model
from samq.records import Evaluation, Metric

MEASURED, ERROR = "memory/measured_vram_bytes", "memory/vram_prediction_error_percent"
# A plan counts neither CUDA's kernels, which come with the first batch, nor the work space of its products.
TOLERANCE, CUDA_BYTES = 0.05, 256 * 2**20


def vram_room(settings: EvaluationSettings) -> Room:
    """The context that memory is predicted for."""
    return Room(settings.vram_context_tokens, kv_type=settings.kv_type)


def planned_vram(gguf: Path, share: GpuShare, settings: EvaluationSettings, predicted: float) -> float:
    """Bytes that the share should take of the GPUs: `predicted`, which is for all layers, or llama.cpp's plan of fewer.

    Raises ToolError if llama.cpp cannot plan it.
    """
    return planned_gpu_bytes(gguf, share, vram_room(settings)) if share.layers > 0 else predicted


def measure_vram(
    model: Model,
    token_ids: NDArray[np.int32],
    settings: EvaluationSettings,
    planned: float,
    peak: gpu.MemoryPeak,
) -> dict[str, Metric]:
    """Put a batch of tokens into a context, and compare the memory in use with `planned`, in bytes.

    `peak` was started just before the model was loaded. Raises SamqError, with the reason, where that cannot be measured.
    """
    if peak.growth_now() is None:
        raise SamqError(gpu.NO_NVML)
    if model.gpu_share.layers == 0:
        raise SamqError("no layer of the model is on a GPU")
    room = vram_room(settings)
    prompt = np.resize(token_ids, max(1, min(PHYSICAL_BATCH_TOKENS, room.tokens - 1)))
    outputs = 1 if model.gpu_share.layers < 0 else None  # as it was planned
    with model.context(room.tokens, outputs=outputs, kv_type=room.kv_type, threads=settings.threads) as context:
        if (
            min(gpu.free_gpu_bytes(), default=0) < SPARE_BYTES
        ):  # CUDA ends the process where computing needs more than there is
            raise SamqError(f"a context of {room.tokens} tokens leaves less than {SPARE_BYTES // 2**20} MiB of a GPU")
        positions = np.arange(len(prompt))
        context.decode(prompt, positions, 0, positions == len(prompt) - 1)
        context.decode(prompt[:1], [len(prompt)], 0, True)
        measured = peak.growth_now() or 0
    return {MEASURED: Metric(value=measured), ERROR: Metric(value=100 * (measured - planned) / planned)}


def vram_warning(evaluation: Evaluation) -> str | None:
    """One sentence if the prediction is off by more than the tolerance; None if not, or if that was not measured."""
    if ERROR not in evaluation.metrics:
        return None
    measured, error = evaluation.metrics[MEASURED].value, evaluation.metrics[ERROR].value / 100
    planned = measured / (1 + error)
    if abs(measured - planned) <= TOLERANCE * planned + CUDA_BYTES:
        return None
    return (
        f"{evaluation.name} takes {measured / 1e6:.0f} MB of GPU memory, but llama.cpp planned {planned / 1e6:.0f} MB "
        f"({100 * error:+.0f} %): leave that much room where you serve it, and do not rely on {VRAM} here"
    )
