"""One candidate, or the baseline, from request to record."""

import platform
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from samq.errors import SamqError
from samq.evaluation.baseline import BASELINE_KV_TYPE, Baseline, cut_chunks, read_tokens, write_baseline
from samq.evaluation.divergence import measure_divergence
from samq.evaluation.json_compliance import json_room, measure_json
from samq.evaluation.json_prompts import JsonPrompt, load_prompts
from samq.evaluation.metrics import VRAM
from samq.evaluation.settings import BaselineRequest, EvaluationRequest, EvaluationSettings
from samq.evaluation.speed import measure_speed
from samq.evaluation.vram import MEASURED as MEASURED_VRAM
from samq.evaluation.vram import measure_vram, planned_vram, vram_room
from samq.files import ANSWERS_NAME, DIVERGENCE_NAME, EVALUATION_NAME
from samq.llamacpp import gpu
from samq.llamacpp.fit import Room, choose_gpu_share
from samq.llamacpp.memory import predict_memory
from samq.llamacpp.runtime import Model, default_threads, system_info
from samq.output import make_folder
from samq.records import Evaluation, Metric

Report = Callable[[str, int, int], None]  # (what is being measured, done, total)


def compute_baseline(request: BaselineRequest, report: Report) -> Baseline:
    """Write the full-precision model's logits, and `baseline.json`, into the request's output folder."""
    make_folder(request.output)
    token_ids = read_tokens(request.tokens)
    room = Room(request.settings.context_tokens, kv_type=BASELINE_KV_TYPE)
    share = choose_gpu_share(request.gguf, request.settings.gpu_layers, lambda _: room)
    with Model(request.gguf, gpu_layers=share) as model:
        chunks = _chunks(model, token_ids, request.settings)
        return write_baseline(
            model, request.sha256, chunks, request.settings, request.output, partial(report, "baseline")
        )


def evaluate(request: EvaluationRequest, report: Report) -> Evaluation:
    """Measure all that can be measured, and write it into the request's output folder.

    That gets `divergence.parquet` (a row a scored token), `json.parquet` (a row a prompt) and, last, `evaluation.json`.
    What this machine or request does not allow to measure is named in `missing`; a candidate that cannot be loaded, or
    computes nonsense, raises SamqError.
    """
    settings = request.settings
    make_folder(request.output)
    token_ids = read_tokens(request.tokens)
    metrics: dict[str, Metric] = {}
    missing: dict[str, str] = {}
    prompts = load_prompts()[: settings.json_prompts]
    share = choose_gpu_share(request.gguf, settings.gpu_layers, partial(_largest_room, prompts, settings))
    planned: float | None = None
    try:
        metrics |= predict_memory(
            request.gguf,
            settings.vram_context_tokens,
            kv_type=settings.kv_type,
            gpu_layers=settings.gpu_layers,
            threads=settings.threads,
        )
        planned = planned_vram(request.gguf, share, settings, metrics[VRAM].value)
    except SamqError as error:
        missing["memory"] = str(error)
    with gpu.MemoryPeak() as peak, Model(request.gguf, gpu_layers=share) as model:
        if planned is not None:
            try:
                metrics |= measure_vram(model, token_ids, settings, planned, peak)
            except SamqError as error:
                missing[MEASURED_VRAM] = str(error)
        if request.baseline is None:
            missing["fidelity"] = "the request names no baseline"
        else:
            fidelity, tokens = measure_divergence(
                model,
                _chunks(model, token_ids, settings),
                request.baseline,
                settings,
                partial(report, "fidelity"),
                sha256=request.sha256,
            )
            metrics |= fidelity
            write_table(tokens, request.output / DIVERGENCE_NAME)
        if prompts:
            validity, items = measure_json(model, prompts, settings, partial(report, "json"))
            metrics |= validity
            write_table(items, request.output / ANSWERS_NAME)
        else:
            missing["json"] = "the settings ask for no JSON prompts"
        if settings.speed_requests:
            metrics |= measure_speed(model, token_ids, settings, partial(report, "speed"))
        else:
            missing["speed"] = "the settings ask for no timed requests"
    environment = {
        "threads": str(settings.threads or default_threads()),
        "cpu": _cpu_name(),
        "gpu": ", ".join(gpu.names()) or "none",
        "gpu_layers": share.describe(model.layers + 1),  # llama.cpp counts the output as a layer
        "llama_cpp": version("llama-cpp-python"),
        "llama_cpp_features": system_info(),
    }
    if peak.bytes is None:
        missing["memory/measured_vram_peak_bytes"] = gpu.NO_NVML
    else:
        metrics["memory/measured_vram_peak_bytes"] = Metric(value=peak.bytes)
        environment["measured_vram_peak_of"] = peak.source
    evaluation = Evaluation(
        name=request.name, sha256=request.sha256, metrics=metrics, missing=missing, environment=environment
    )
    evaluation.save(request.output / EVALUATION_NAME)
    return evaluation


def _largest_room(prompts: Sequence[JsonPrompt], settings: EvaluationSettings, model: Model) -> Room:
    """The largest of the contexts that an evaluation makes, one after the other."""
    kv_type = settings.kv_type
    rooms = [vram_room(settings), Room(settings.context_tokens, kv_type=kv_type)]
    if prompts:
        rooms.append(json_room(model, prompts, settings))
    if settings.speed_requests:
        rooms.append(Room(settings.speed_prompt_tokens + settings.speed_generated_tokens, kv_type=kv_type))
    return max(rooms, key=lambda room: room.cells)


def _chunks(model: Model, token_ids: NDArray[np.int32], settings: EvaluationSettings) -> NDArray[np.int32]:
    """The chunks of held-out tokens that are scored."""
    return cut_chunks(token_ids, settings.context_tokens, model.bos if model.adds_bos else None)[: settings.chunks]


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a parquet file; raises SamqError if that is not possible."""
    try:
        table.to_parquet(path, index=False)
    except OSError as error:
        raise SamqError(f"cannot write {path}: {error.strerror}; choose a folder that can be written to") from error


def _cpu_name() -> str:
    """The processor's name as Linux gives it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
