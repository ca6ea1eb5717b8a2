"""Predicted GPU memory against what was measured, and what is said where it cannot be."""

import numpy as np
import pytest

from samq.data.tokens import TokenBatch
from samq.errors import SamqError
from samq.evaluation.lm_eval.room import benchmark_room
from samq.evaluation.measure import evaluate
from samq.evaluation.settings import EvaluationRequest, EvaluationSettings
from samq.evaluation.vram import CUDA_BYTES, ERROR, MEASURED, TOLERANCE, measure_vram, planned_vram, vram_warning
from samq.llamacpp import gpu
from samq.llamacpp.fit import Room
from samq.llamacpp.gpu_share import GpuShare
from samq.llamacpp.runtime import Model
from samq.records import Evaluation, Metric
from tests.conftest import write_tiny_gguf
from tests.samq.serving.tiny_chat import TEMPLATE, add_byte_vocabulary

SETTINGS = EvaluationSettings(
    context_tokens=32, chunks=2, json_prompts=1, json_tokens=8, speed_requests=1, vram_context_tokens=512, threads=1
)
PREDICTED = 10_000_000_000


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("vram") / "tiny.gguf"
    return write_tiny_gguf(
        path, vocabulary=260, context=4096, add_tokenizer=lambda writer: add_byte_vocabulary(writer, TEMPLATE)
    )


class Driver:
    """A driver that has seen this process grow by so many bytes."""

    def __init__(self, growth):
        self.growth_now = lambda: growth


def evaluation(measured):
    metrics = {MEASURED: Metric(value=measured), ERROR: Metric(value=100 * (measured / PREDICTED - 1))}
    return Evaluation(name="Q4_K_M", sha256="0" * 64, metrics=metrics)


def test_a_warning_starts_just_over_the_tolerance_either_way():
    tolerance = TOLERANCE * PREDICTED + CUDA_BYTES
    for off in (0, tolerance - 1e5, 1e5 - tolerance):
        assert vram_warning(evaluation(PREDICTED + off)) is None
    for off, percent in ((tolerance + 1e5, r"\+8"), (-tolerance - 1e5, "-8")):
        warning = vram_warning(evaluation(PREDICTED + off))
        assert f"takes {(PREDICTED + off) / 1e6:.0f} MB of GPU memory, but llama.cpp planned 10000 MB" in warning
        assert percent.lstrip("\\") in warning
    assert vram_warning(Evaluation(name="x", sha256="0" * 64, metrics={}, missing={MEASURED: gpu.NO_NVML})) is None


def test_the_error_is_that_of_the_prediction(gguf, monkeypatch):
    monkeypatch.setattr(gpu, "free_gpu_bytes", lambda: [2**34])
    tokens = np.arange(40, dtype=np.int32)
    with Model(gguf, gpu_layers=GpuShare(-1)) as model:
        metrics = measure_vram(model, tokens, SETTINGS, 4e8, Driver(500_000_000))
        assert {name: metric.value for name, metric in metrics.items()} == {MEASURED: 5e8, ERROR: 25}
        monkeypatch.setattr(gpu, "free_gpu_bytes", lambda: [2**34, 2**29])
        with pytest.raises(SamqError, match="a context of 512 tokens leaves less than 1024 MiB of a GPU"):
            measure_vram(model, tokens, SETTINGS, 4e8, Driver(500_000_000))
        with pytest.raises(SamqError, match="no NVIDIA GPU"):
            measure_vram(model, tokens, SETTINGS, 4e8, Driver(None))
    with Model(gguf, gpu_layers=0) as model, pytest.raises(SamqError, match="no layer of the model is on a GPU"):
        measure_vram(model, tokens, SETTINGS, 4e8, Driver(1))


def test_where_some_layers_are_on_the_gpu_llama_cpp_plans_those(gguf):
    assert planned_vram(gguf, GpuShare(-1), SETTINGS, 5.0) == planned_vram(gguf, GpuShare(0), SETTINGS, 5.0) == 5
    if not gpu.names():
        assert planned_vram(gguf, GpuShare(2), SETTINGS, 5.0) == 0, "all devices are the host's"


@pytest.mark.skipif(bool(gpu.names()), reason="tests/gpu has the figures of a GPU")
def test_without_a_gpu_an_evaluation_says_so_and_where_it_ran(gguf, tmp_path):
    tokens = TokenBatch.of([np.random.default_rng(1).integers(3, 259, 200).tolist()]).save(tmp_path / "tokens.npz")
    request = EvaluationRequest(
        gguf=gguf, sha256="0" * 64, tokens=tokens, settings=SETTINGS, name="tiny", output=tmp_path / "out"
    )
    evaluation = evaluate(request, lambda *_: None)
    assert evaluation.missing == dict.fromkeys((MEASURED, "memory/measured_vram_peak_bytes"), gpu.NO_NVML) | {
        "fidelity": "the request names no baseline"
    }
    assert ERROR not in evaluation.metrics and evaluation.why_missing(ERROR) is None
    assert evaluation.environment["gpu_layers"] == "none" and evaluation.environment["gpu"] == "none"
    assert evaluation.metrics["memory/predicted_vram_bytes"].value > 0


def test_benchmarks_get_room_for_16_usual_texts_or_for_those_of_the_settings(gguf):
    with Model(gguf, allocate=False) as model:
        assert benchmark_room(None, "F16", model) == Room(2048, 16, "F16")
        assert benchmark_room(300, "Q8_0", model) == Room(300, 16, "Q8_0")
        assert benchmark_room(10**6, "F16", model) == Room(4096, 16, "F16")
    assert Room(300, 16).cells == 512 * 16
