"""Benchmarks are looked up before the heavy work, visibly: lm-eval takes seconds to import, and data may be fetched."""

from dataclasses import replace
from pathlib import Path

from samq.evaluation.settings import BenchmarkSettings
from samq.sweep.benchmarking import Candidate
from tasks.benchmark import AvailableBenchmarks, EngineSettings, benchmark, find_benchmarks


def test_finding_benchmarks_is_seen_on_the_terminal(terminal):
    available = find_benchmarks(BenchmarkSettings(tasks=("samq_hellaswag", "samq_json"), limit=2))
    assert set(available.digests) == {"samq_hellaswag", "samq_json"} and available.unavailable == {}
    assert "find benchmarks" in terminal.getvalue() and "1/2" in terminal.getvalue()


def test_looking_for_no_benchmarks_finds_none_and_shows_nothing(terminal):
    assert find_benchmarks(BenchmarkSettings(tasks=())) == AvailableBenchmarks({}, {})
    assert "find benchmarks" not in terminal.getvalue()


def test_a_benchmarks_key_is_of_the_gguf_the_task_and_the_settings_alone(at):
    def key(
        name="Q4_K_M", gguf="/store/assemble/1/model.gguf", sha256="a" * 64, timeout_s=60.0, kv_type="F16", **changed
    ):
        inputs = {"task": "samq_json", "task_digest": "b" * 64, "settings": BenchmarkSettings(limit=2), **changed}
        inputs |= {
            "candidate": Candidate(name=name, gguf=Path(gguf), sha256=sha256),
            "engine": EngineSettings(kv_type, 1, 0),
        }
        return benchmark.cache_policy.artifact_key(replace(at, timeout_s=timeout_s), inputs)

    assert key() == key(name="budget-size-of-Q4_K_M", gguf="/elsewhere/quantize/2/model.gguf", timeout_s=5.0)
    others = [{"sha256": "c" * 64}, {"task_digest": "d" * 64}, {"settings": BenchmarkSettings()}, {"kv_type": "Q8_0"}]
    assert len({key(), *(key(**other) for other in others)}) == 5


def test_a_benchmarks_run_is_named_by_task_and_candidate():
    candidate = Candidate(name="Q4_K_M", gguf=Path("model.gguf"), sha256="a" * 64)
    assert benchmark.task_run_name.format(task="samq_json", candidate=candidate) == "samq_json on Q4_K_M"
