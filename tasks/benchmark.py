"""Stages: lm-eval's tasks put to a candidate, one stage a task; and before, whether they can be."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from samq.evaluation.settings import BenchmarkRequest, BenchmarkSettings, EvaluationSettings, benchmark_key
from samq.progress import bar
from samq.promotion.evidence import production_items
from samq.store import Artifact, stored_file
from samq.sweep.benchmarking import Candidate, compare_benchmarks, with_benchmarks
from samq.sweep.sweep import Sweep
from samq.tracking.registry import connect
from samq.tracking.tracked import TrackingSettings
from samq.workspace import Workspace
from tasks.evaluate import measure_alone
from tasks.gpu import in_turn, llama_cpp_has_gpu
from tasks.stage import RETRY_DELAYS_S, stage, step


@dataclass(frozen=True)
class AvailableBenchmarks:
    """What can be run here and now."""

    digests: Mapping[str, str]  # task -> digest of it and its data
    unavailable: Mapping[str, str]  # task -> why it cannot be run


@dataclass(frozen=True)
class EngineSettings:
    """Settings of llama.cpp that answers depend on."""

    kv_type: Literal["F16", "Q8_0", "Q4_0"]
    threads: int | None
    gpu_layers: int | None

    @classmethod
    def of(cls, settings: EvaluationSettings) -> Self:
        """Those of an evaluation's settings."""
        return cls(settings.kv_type, settings.threads, settings.gpu_layers)


@step("find benchmarks")
def find_benchmarks(settings: BenchmarkSettings) -> AvailableBenchmarks:
    """Look up the tasks and their data. Not cached: a network may come.

    Raises SamqError for an unknown task or a malformed file, before the heavy work.
    """
    if not settings.tasks:
        return AvailableBenchmarks({}, {})
    with bar("find benchmarks") as progress:
        from samq.evaluation.lm_eval.benchmark_tasks import check_benchmarks  # lm-eval takes seconds to import

        return AvailableBenchmarks(*check_benchmarks(settings, progress, RETRY_DELAYS_S))


@stage(
    "benchmark",
    version=4,
    run_name="{task} on {candidate.name}",
    packages=("llama-cpp-python", "lm-eval", "jsonschema"),
)
@in_turn(llama_cpp_has_gpu)
def benchmark(
    at: Workspace,
    folder: Path,
    candidate: Candidate,
    task: str,
    task_digest: str,
    settings: BenchmarkSettings,
    engine: EngineSettings,
) -> None:
    """`evaluation.json` with the task's figures, and `benchmarks.parquet` with each item's.

    The key has `task_digest`, the content of the task and its data, beside the GGUF's and the settings. What is stored has
    no more of the candidate than its key: another one with the same GGUF gets it, too.
    """
    request = BenchmarkRequest(
        name=candidate.sha256[:12],
        gguf=stored_file(candidate.gguf),
        sha256=candidate.sha256,
        output=folder,
        benchmarks=settings.model_copy(update={"tasks": (task,)}),
        settings=EvaluationSettings(kv_type=engine.kv_type, threads=engine.threads, gpu_layers=engine.gpu_layers),
    )
    measure_alone(request, folder, f"{task} on {candidate.name}", at.timeout_s)


def join_benchmarks(
    sweep: Sweep,
    finalists: Collection[str],
    answers: Mapping[tuple[str, str], Artifact | Exception],
    unavailable: Mapping[str, str],
) -> Sweep:
    """The sweep with the finalists' benchmarks; `answers` is by candidate and task.

    A task that failed, or is unavailable, is missing there, with the reason.
    """
    results = []
    for result in sweep.results:
        if result.name in finalists:
            answered = {task: answer for (name, task), answer in answers.items() if name == result.name}
            folders = [answer.whole() for answer in answered.values() if isinstance(answer, Artifact)]
            failed = {task: str(answer) for task, answer in answered.items() if isinstance(answer, Exception)}
            missing = {benchmark_key(task): why for task, why in {**unavailable, **failed}.items()}
            result = with_benchmarks(result, folders, missing)
        results.append(result)
    return replace(sweep, results=tuple(results))


@step("compare benchmarks")
def compare_with_references(sweep: Sweep, margin: float, tracking: TrackingSettings) -> Sweep:
    """The sweep with paired comparisons, item by item: with full precision, and with what is in production.

    Not cached: production may be another tomorrow.
    """
    name = tracking.registered_model if any(result.benchmark_folders for result in sweep.results) else None
    with bar("compare benchmarks"):
        production = production_items(connect(tracking.tracking_uri), name) if name else None
        return replace(sweep, benchmarks=tuple(compare_benchmarks(sweep.results, margin, production)))
