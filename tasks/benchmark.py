"""Stages: lm-eval's tasks put to a candidate, one stage a task; and before, whether they can be."""

from pathlib import Path
from typing import Literal

from prefect import task

from samq.sweep.benchmarking import Candidate, compare_benchmarks
from samq.evaluation.settings import BenchmarkRequest, BenchmarkSettings, EvaluationSettings
from samq.promotion.evidence import production_items
from samq.progress import bar
from samq.sweep.selection import Result
from samq.tracking.registry import connect
from samq.sweep.significance import PairedComparison
from samq.tracking.sweep_runs import TrackingSettings
from tasks.evaluate import measure_alone
from tasks.stage import stage


@task(name="find benchmarks")
def find_benchmarks(settings: BenchmarkSettings) -> tuple[dict[str, str], dict[str, str]]:
    """The digest of each task that can be run here and now, and why the others cannot; not cached: a network may come.

    Raises SamqError for an unknown task or a malformed file, before the heavy work.
    """
    with bar("find benchmarks") as progress:
        from samq.evaluation.lm_eval.benchmark_tasks import check_benchmarks  # lm-eval takes seconds to import

        return check_benchmarks(settings, progress)


@stage(
    "benchmark",
    version=3,
    run_name="{task} on {candidate.name}",
    packages=("llama-cpp-python", "lm-eval", "jsonschema"),
)
def benchmark(
    folder: Path,
    candidate: Candidate,
    task: str,
    task_digest: str,
    settings: BenchmarkSettings,
    kv_type: Literal["F16", "Q8_0", "Q4_0"],
    threads: int | None,
    gpu_layers: int | None,
    timeout_s: float,
) -> None:
    """`evaluation.json` with the task's figures, and `benchmarks.parquet` with each item's.

    The key has `task_digest`, the content of the task and its data, beside the GGUF's and the settings. What is stored has
    no more of the candidate than its key: another one with the same GGUF gets it, too.
    """
    request = BenchmarkRequest(
        name=candidate.sha256[:12],
        gguf=candidate.gguf,
        sha256=candidate.sha256,
        output=folder,
        benchmarks=settings.model_copy(update={"tasks": (task,)}),
        settings=EvaluationSettings(kv_type=kv_type, threads=threads, gpu_layers=gpu_layers),
    )
    measure_alone(request, folder, f"{task} on {candidate.name}", timeout_s)


@task(name="compare benchmarks")
def compare_items(results: list[Result], margin: float, tracking: TrackingSettings) -> list[PairedComparison]:
    """Paired comparisons with full precision, and with what is in production under the sweep's name, item by item.

    Not cached: production may be another tomorrow.
    """
    asked = any(result.benchmark_folders for result in results)
    name = tracking.registered_model
    with bar("compare benchmarks"):
        production = production_items(connect(tracking.tracking_uri), name) if asked and name else None
        return compare_benchmarks(results, margin, production)
