import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from samq.data.tokens import TokenBatch
from samq.errors import SamqError
from samq.evaluation.settings import BaselineRequest, EvaluationRequest, EvaluationSettings
from samq.evaluation.speed import measure_speed
from samq.gguf.file import read_tensors
from samq.llamacpp.generation import Decoding, generate
from samq.llamacpp.memory import predict_memory, read_buffer_bytes, weights_on_gpu
from samq.llamacpp.runtime import Model
from samq.records import Evaluation
from tests.conftest import write_tiny_gguf

MIB = 1024 * 1024


def test_settings_that_score_nothing_are_refused():
    with pytest.raises(ValidationError, match="score_from must be under context_tokens - 1"):
        EvaluationSettings(context_tokens=64, score_from=63)
    assert EvaluationSettings(context_tokens=64).first_scored == 32
    assert EvaluationSettings(context_tokens=64, score_from=10).scored_per_chunk == 53


def test_a_memory_plan_is_read_from_the_log():
    log = [
        "llama_kv_cache:      CUDA0 KV buffer size =    90.00 MiB",
        "llama_kv_cache: size =   90.00 MiB (  4096 cells,  30 layers,  1/1 seqs), K (f16):   45.00 MiB, V (f16): 45 MiB",
        "sched_reserve:      CUDA0 compute buffer size =    98.25 MiB",
        "sched_reserve:  CUDA_Host compute buffer size =     9.13 MiB",
    ]
    assert read_buffer_bytes(log) == (90 * MIB, 98.25 * MIB)
    cpu_only = [log[1], "sched_reserve:        CPU compute buffer size =    97.13 MiB"]
    assert read_buffer_bytes(cpu_only) == (90 * MIB, round(97.13 * MIB))
    with pytest.raises(SamqError, match="does not give the size of the KV cache"):
        read_buffer_bytes(log[2:])


def test_the_embedding_needs_gpu_memory_only_where_it_is_the_output_too(tmp_path, tiny_gguf):
    tensors = read_tensors(tiny_gguf)
    everything = sum(tensor.bytes for tensor in tensors.values())
    assert weights_on_gpu(tiny_gguf) == everything - tensors["token_embd.weight"].bytes
    tied = write_tiny_gguf(tmp_path / "tied.gguf", tied=True)
    assert weights_on_gpu(tied) == sum(tensor.bytes for tensor in read_tensors(tied).values())


@pytest.mark.e2e
def test_predicted_memory_follows_the_context_and_the_kv_type(smollm2_q4_k_m):
    def predicted(context_tokens, **settings):
        metrics = predict_memory(smollm2_q4_k_m, context_tokens, **settings)
        return {name.removeprefix("memory/"): metric.value for name, metric in metrics.items()}

    short, long = predicted(1024), predicted(4096)
    # 30 layers, K and V of 3 heads x 64, 2 bytes each
    assert short["kv_cache_bytes"] == 1024 * 30 * 2 * 3 * 64 * 2
    assert long["kv_cache_bytes"] == 4 * short["kv_cache_bytes"]
    quantized = predicted(4096, kv_type="Q8_0")
    assert quantized["kv_cache_bytes"] == pytest.approx(long["kv_cache_bytes"] * 34 / 64, rel=1e-3)
    assert long["file_bytes"] == smollm2_q4_k_m.stat().st_size
    assert long["predicted_vram_bytes"] == sum(
        long[name] for name in ("weights_bytes", "kv_cache_bytes", "compute_buffer_bytes")
    )


@pytest.mark.e2e
def test_speed_is_of_each_request_and_generation_of_many_is_that_of_one(smollm2_q4_k_m):
    settings = EvaluationSettings(speed_requests=3, speed_warmup=1, speed_prompt_tokens=16, speed_generated_tokens=8)
    with Model(smollm2_q4_k_m) as model:
        metrics = measure_speed(model, model.tokenize("def add(a, b): return a + b\n" * 3), settings)
        prompts = [model.tokenize(f"def {name}(a, b):\n    return") for name in ("add", "subtract", "multiply")]
        one_line = Decoding(limit=12, finished=lambda text: "\n" in text)
        together = generate(model, prompts, one_line)
        alone = [generate(model, [prompt], one_line)[0] for prompt in prompts]
    assert together == alone == [" a + b\n", " a - b\n", " a * b\n"]
    value = {name: metric.value for name, metric in metrics.items()}
    assert all(metric.n == 3 for metric in metrics.values()) and all(number > 0 for number in value.values())
    assert value["speed/time_to_first_token_ms"] < value["speed/latency_p50_ms"] <= value["speed/latency_p99_ms"]


@pytest.fixture
def request_of(tmp_path, smollm2_q4_k_m):
    """Make an EvaluationRequest over some held-out tokens."""
    tokens = tmp_path / "tokens.npz"
    with Model(smollm2_q4_k_m) as model:
        TokenBatch.of([model.tokenize("def add(a, b):\n    return a + b\n\n\n" * 20).tolist()]).save(tokens)

    def make(**arguments):
        settings = {"context_tokens": 32, "chunks": 3, "json_prompts": 1, "json_tokens": 8, "speed_requests": 1}
        request = EvaluationRequest(
            name="q4",
            gguf=arguments.get("gguf", smollm2_q4_k_m),
            sha256="0" * 64,
            tokens=tokens,
            baseline=arguments.get("baseline"),
            output=tmp_path / "out",
            settings=EvaluationSettings(**settings | arguments.get("settings", {})),
        )
        return request.save(tmp_path / "request.json")

    return make


def carry_out(request):
    return subprocess.run(
        [sys.executable, "-m", "samq.evaluation", request], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.e2e
def test_a_child_measures_everything_and_says_what_is_missing(request_of, tmp_path, smollm2_f16):
    request = EvaluationRequest.load(request_of())
    BaselineRequest(
        gguf=smollm2_f16,
        sha256="1" * 64,
        tokens=request.tokens,
        output=tmp_path / "baseline",
        settings=request.settings,
    ).save(tmp_path / "baseline.json")
    assert carry_out(tmp_path / "baseline.json").returncode == 0
    done = carry_out(request_of(baseline=tmp_path / "baseline"))
    assert done.returncode == 0, done.stderr
    assert "progress: fidelity 3/3" in done.stdout
    evaluation = Evaluation.load(tmp_path / "out" / "evaluation.json")
    assert {name.partition("/")[0] for name in evaluation.metrics} == {"fidelity", "json", "speed", "memory"}
    assert evaluation.metrics["fidelity/mean_kld_nats"].value > 0
    scored = pd.read_parquet(tmp_path / "out" / "divergence.parquet")
    assert len(scored) == evaluation.metrics["fidelity/mean_kld_nats"].n == 3 * 15
    assert np.isclose(scored["kld"].mean(), evaluation.metrics["fidelity/mean_kld_nats"].value)
    assert len(pd.read_parquet(tmp_path / "out" / "json.parquet")) == 1

    done = carry_out(request_of(settings={"json_prompts": 0, "speed_requests": 0}))
    assert done.returncode == 0, done.stderr
    missing = Evaluation.load(tmp_path / "out" / "evaluation.json").missing
    assert missing.keys() >= {"fidelity", "json", "speed"}


@pytest.mark.e2e
def test_what_cannot_be_measured_is_one_sentence_and_exit_code_2(request_of, tmp_path, smollm2_q4_k_m):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2_q4_k_m.read_bytes()[:1_000_000])
    for arguments, message in (
        ({"gguf": cut}, "cut.gguf"),
        ({"settings": {"context_tokens": 4096}, "baseline": tmp_path}, "do not fill a chunk of 4096"),
        ({"baseline": tmp_path / "nowhere"}, "nowhere"),
    ):
        done = carry_out(request_of(**arguments))
        assert done.returncode == 2
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ") and message in last
        assert not (tmp_path / "out" / "evaluation.json").exists()
    (tmp_path / "bad.json").write_text(json.dumps({"schema": "samq.evaluation-request/1"}))
    assert carry_out(tmp_path / "bad.json").returncode == 2
