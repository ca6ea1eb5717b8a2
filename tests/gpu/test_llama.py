"""llama.cpp on a GPU: the same model as on the CPU, the same numbers every time, and the memory that was predicted."""

import re
from functools import partial

import numpy as np
import pytest
import torch

from samq.data.tokens import TokenBatch
from samq.errors import SamqError
from samq.evaluation.divergence import compare_logits
from samq.evaluation.measure import compute_baseline, evaluate
from samq.evaluation.settings import BaselineRequest, EvaluationRequest, EvaluationSettings
from samq.evaluation.vram import ERROR, MEASURED, vram_warning
from samq.llamacpp import gpu
from samq.llamacpp.fit import SPARE_BYTES, Room, choose_gpu_share, planned_gpu_bytes
from samq.llamacpp.generation import Decoding, generate
from samq.llamacpp.gpu_share import GpuShare
from samq.llamacpp.memory import predict_memory, weights_on_gpu
from samq.llamacpp.runtime import Model, captured_log

MIB = 2**20
SETTINGS = EvaluationSettings(
    context_tokens=256, chunks=4, json_prompts=4, json_tokens=16, speed_requests=2, speed_warmup=1,
    vram_context_tokens=8192, threads=2,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(3, 259, 256).astype(np.int32)


def logits(model):
    with model.context(len(TOKENS), threads=2) as context:
        return context.decode(TOKENS, np.arange(len(TOKENS)), 0, True).copy()


def test_the_gpu_computes_what_the_cpu_does_and_the_same_every_time(sharp_gguf):
    outputs = []
    for layers in (0, 5, None, None):
        with Model(sharp_gguf, gpu_layers=layers) as model:
            outputs.append(logits(model))
            if layers is None:
                assert model.gpu_share == GpuShare(-1)
                assert np.array_equal(logits(model), outputs[-1])
    cpu, some, one, two = outputs
    assert np.array_equal(one, two)
    for other in (some, one):
        scored = compare_logits(cpu, other, TOKENS)
        assert scored["kld"].mean() < 1e-4 and scored["same_top"].mean() > 0.98


def test_answers_are_the_same_every_time(sharp_gguf):
    with Model(sharp_gguf) as model:
        prompts = [TOKENS[start : start + 40] for start in range(0, 200, 10)]
        answer = partial(generate, model, prompts, Decoding(limit=30, finished=lambda text: False))
        assert answer() == answer()


@pytest.mark.parametrize("kv_type", ["F16", "Q8_0"])
def test_weights_and_cache_are_as_large_as_predicted(one_gpu, sharp_gguf, kv_type):
    memory = predict_memory(sharp_gguf, 8192, kv_type=kv_type)
    predicted = {name: metric.value for name, metric in memory.items()}
    with captured_log() as log, Model(sharp_gguf) as model, model.context(8192, outputs=1, kv_type=kv_type):
        sizes = {
            what: sum(
                float(size) for size in re.findall(rf"CUDA\d+ {what} buffer size = +([\d.]+) MiB", "\n".join(log()))
            )
            for what in ("model", "KV", "compute")
        }
    assert predicted["memory/weights_bytes"] / MIB == pytest.approx(sizes["model"], abs=0.02)
    assert predicted["memory/kv_cache_bytes"] / MIB == pytest.approx(sizes["KV"], abs=0.02)
    assert predicted["memory/compute_buffer_bytes"] / MIB == pytest.approx(sizes["compute"], abs=0.02)


def test_the_driver_sees_what_was_predicted_and_that_it_is_given_back(sharp_gguf):
    with Model(sharp_gguf) as model, model.context(256):
        pass  # CUDA's own share comes with the first model, and stays
    before = gpu.used_bytes()
    predicted = predict_memory(sharp_gguf, SETTINGS.vram_context_tokens)["memory/predicted_vram_bytes"].value
    assert abs(gpu.used_bytes() - before) < 8 * MIB, "a prediction allocates nothing"
    with Model(sharp_gguf) as model, model.context(8192, outputs=1):
        assert gpu.used_bytes() - before == pytest.approx(predicted, abs=64 * MIB)
    assert abs(gpu.used_bytes() - before) < 64 * MIB


def test_an_evaluation_says_what_it_ran_on_and_a_model_is_no_distance_from_itself(sharp_gguf, tmp_path):
    tokens = TokenBatch.of([np.random.default_rng(1).integers(3, 259, 1200).tolist()]).save(tmp_path / "tokens.npz")
    given = dict(gguf=sharp_gguf, sha256="0" * 64, tokens=tokens, settings=SETTINGS)
    compute_baseline(BaselineRequest(output=tmp_path / "base", **given), lambda *_: None)
    request = EvaluationRequest(name="same", baseline=tmp_path / "base", output=tmp_path / "out", **given)
    evaluation = evaluate(request, lambda *_: None)
    assert evaluation.missing == {}
    assert evaluation.metrics["fidelity/mean_kld_nats"].value == 0
    assert evaluation.metrics["fidelity/same_top_percent"].value == 100
    assert evaluation.environment["gpu"] == ", ".join(gpu.names()) and "NVIDIA" in evaluation.environment["gpu"]
    assert "CUDA" in evaluation.environment["llama_cpp_features"]
    assert evaluation.environment["measured_vram_peak_of"] == "this process"
    assert evaluation.environment["gpu_layers"] == "17 of 17"
    assert vram_warning(evaluation) is None, evaluation.metrics[ERROR]
    predicted = evaluation.metrics["memory/predicted_vram_bytes"].value
    assert evaluation.metrics[MEASURED].value == pytest.approx(predicted * (1 + evaluation.metrics[ERROR].value / 100))
    # with CUDA's own share, and what other tests of this process hold
    weights = evaluation.metrics["memory/weights_bytes"].value
    assert weights < evaluation.metrics["memory/measured_vram_peak_bytes"].value < weights + 4000 * MIB


def test_as_many_layers_are_on_the_gpu_as_fit_and_that_is_recorded(sharp_gguf, leave, tmp_path):
    room = Room(8192)
    assert choose_gpu_share(sharp_gguf, None, lambda _: room) == GpuShare(-1)
    weights = weights_on_gpu(sharp_gguf)
    tokens = TokenBatch.of([np.random.default_rng(1).integers(3, 259, 1200).tolist()]).save(tmp_path / "tokens.npz")
    with Model(sharp_gguf) as model, model.context(256):
        pass  # CUDA's own share comes before what is left is counted
    # llama-fit-params takes CUDA's own share of its process from what is left
    with leave(SPARE_BYTES + 500 * MIB + weights // 2 + planned_gpu_bytes(sharp_gguf, GpuShare(-1), room) - weights):
        share = choose_gpu_share(sharp_gguf, None, lambda _: room)
        assert 0 < share.layers < 17, share
        planned = planned_gpu_bytes(sharp_gguf, share, room)
        assert 0 < planned < planned_gpu_bytes(sharp_gguf, GpuShare(-1), room)
        request = EvaluationRequest(
            name="half", gguf=sharp_gguf, sha256="0" * 64, tokens=tokens, output=tmp_path, settings=SETTINGS
        )
        evaluation = evaluate(request, lambda *_: None)
    layers = int(evaluation.environment["gpu_layers"].removesuffix(" of 17"))
    assert 0 < layers < 17
    assert vram_warning(evaluation) is None, evaluation.metrics
    assert evaluation.metrics[MEASURED].value < evaluation.metrics["memory/predicted_vram_bytes"].value


def test_a_model_that_the_gpu_does_not_hold_is_one_sentence(sharp_gguf, leave):
    with (
        leave(200 * MIB),
        pytest.raises(SamqError, match=r"the GPU's memory does not hold it; set gpu_layers to fewer"),
    ):
        Model(sharp_gguf)
    with leave(200 * MIB), Model(sharp_gguf, gpu_layers=2) as model:
        assert model.gpu_share == GpuShare(2)


def test_what_torch_keeps_for_later_is_given_back():
    tensor = torch.ones(2**30, dtype=torch.uint8, device="cuda")
    del tensor
    kept, free = torch.cuda.memory_reserved(), sum(gpu.free_gpu_bytes())
    assert kept >= 2**30
    gpu.release_torch_cache()
    assert torch.cuda.memory_reserved() <= kept - 2**30 and sum(gpu.free_gpu_bytes()) >= free + 2**30 - 64 * MIB


def test_gpus_that_cuda_may_not_use_are_not_counted(monkeypatch):
    assert gpu.names() and min(gpu.free_gpu_bytes()) > 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert len(gpu.names()) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "99,0")
    assert gpu.names() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.names() == [] and gpu.free_gpu_bytes() == []
