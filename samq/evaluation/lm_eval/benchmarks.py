"""lm-eval's tasks, put to one candidate: the figures, and each item's for paired statistics (`samq.sweep.significance`).

Tasks run one after another: what keeps one from being measured is said of it, and the others are measured.
"""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
from lm_eval import evaluate
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED

from samq.errors import SamqError
from samq.evaluation.lm_eval.benchmark_tasks import Benchmark, TaskLibrary, code_allowed, quiet, seeded
from samq.evaluation.lm_eval.harness import GgufLM, explain
from samq.evaluation.measure import Report, make_folder, write_table
from samq.evaluation.sandbox.run import isolation
from samq.evaluation.settings import EVALUATION_NAME, BenchmarkRequest, BenchmarkSettings, benchmark_key, metric_part
from samq.llamacpp.runtime import Model
from samq.markdown import one_line
from samq.progress import Progress, silent
from samq.records import Evaluation, Metric
from samq.sweep.significance import ITEMS_NAME

logger = logging.getLogger(__name__)

ITEM_COLUMNS = ["benchmark", "task", "item", "document", "metric", "value", "higher_is_better", "answer"]
_NOT_OURS = "the task's own: SAMQ does not run its code"
_BOOTSTRAP_RESAMPLES = 1000  # for the standard error of metrics that are no means


@dataclass(frozen=True)
class BenchmarkResults:
    """What a candidate did on its tasks.

    `items` has a row for each item and metric: what was asked for (`benchmark`, as in the metrics' names), the task of it,
    the item's number and a hash of its document and of the requests made from it, so that what was asked with other
    examples or another chat template is told apart, the metric's name without its path, its value, whether a higher one is
    better, and the answer: the text generated, or the log-likelihoods of the choices in nats as JSON.
    """

    metrics: dict[str, Metric]
    missing: dict[str, str]  # `eval/TASK` -> why it was not measured
    items: pd.DataFrame
    environment: dict[str, str]


def benchmark(request: BenchmarkRequest, report: Report) -> Evaluation:
    """Put the request's tasks to its candidate, and write `benchmarks.parquet` and, last, `evaluation.json`.

    The evaluation has the benchmarks' metrics only. Raises SamqError if the candidate cannot be loaded, or none of the
    tasks can be measured: a failure is no result to be kept.
    """
    make_folder(request.output)
    settings = request.settings
    with Model(request.gguf, gpu_layers=settings.gpu_layers) as model:
        found = measure_benchmarks(
            model,
            request.benchmarks,
            kv_type=settings.kv_type,
            threads=settings.threads,
            progress=partial(report, "benchmarks"),
        )
    if found.missing and not found.metrics:
        raise SamqError("; ".join(found.missing.values()))
    write_table(found.items, request.output / ITEMS_NAME)
    evaluation = Evaluation(
        name=request.name,
        sha256=request.sha256,
        metrics=found.metrics,
        missing=found.missing,
        environment=found.environment,
    )
    evaluation.save(request.output / EVALUATION_NAME)
    return evaluation


def measure_benchmarks(
    model: Model,
    settings: BenchmarkSettings,
    *,
    kv_type: str = "F16",
    threads: int | None = None,
    progress: Progress = silent,
) -> BenchmarkResults:
    """Put the tasks of the settings to a model; see `run_benchmarks`. Progress is of the requests of one task."""
    lm = GgufLM(model, context_tokens=settings.context_tokens, kv_type=kv_type, threads=threads, progress=progress)
    return run_benchmarks(lm, settings)


def run_benchmarks(lm: LM, settings: BenchmarkSettings) -> BenchmarkResults:
    """Put the tasks of the settings to an lm-eval model, one after another.

    Metrics are named `eval/TASK/METRIC`: of a task's several filters those after the first have theirs in the name too, as
    `exact_match_flexible-extract`. A group that aggregates its tasks is reported in their place, and they are among the
    items only. A task that fails is named in `missing` as `eval/TASK`, and so is one of which a request failed: what
    lm-eval makes of that is no figure. Raises SamqError if a folder of tasks is missing or holds a malformed file.
    """
    library = TaskLibrary(settings.task_folders)
    metrics: dict[str, Metric] = {}
    missing: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    environment = {"lm_eval": version("lm-eval")}
    failures: Counter[str] = lm.failures if hasattr(lm, "failures") else Counter()
    for name in dict.fromkeys(settings.tasks):
        failures.clear()
        reason = ""
        try:
            with seeded(settings.seed):
                benchmark = library.open(name, settings)
                if benchmark.runs_code:
                    environment[f"code_isolation/{metric_part(name)}"] = (
                        isolation() if benchmark.confines_code else _NOT_OURS
                    )
                output = _run(lm, benchmark, settings)
            found, items = _metrics(benchmark, output), list(_items(benchmark, output))
        except SamqError as error:
            reason = str(error)
        except Exception as error:  # a task is a program of its author's, and must not take the others along
            logger.warning("%s failed", name, exc_info=True)
            raised = f"{type(error).__name__}: {one_line(str(error))}"
            reason = f"{name} failed in lm-eval ({raised}); its log has more"
        reason = explain(failures) or reason  # a task may have stumbled over the answer to a request that failed
        if reason:
            missing[benchmark_key(name)] = reason
        else:
            metrics |= found
            rows += items
    return BenchmarkResults(metrics, missing, pd.DataFrame(rows, columns=ITEM_COLUMNS), environment)


def _run(lm: LM, benchmark: Benchmark, settings: BenchmarkSettings) -> dict[str, Any]:
    """lm-eval's results; as its `simple_evaluate`, without the second that this takes to describe the machine."""
    for task in benchmark.tasks.values():
        own = task.get_config("num_fewshot")
        if own is None or (own != 0 and settings.few_shots is not None):  # where a task says 0, none fit its prompt
            task.set_config("num_fewshot", settings.few_shots or 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED if settings.seed is None else settings.seed)
    with quiet(), code_allowed(settings.run_code):
        output = evaluate(
            lm=lm,
            task_dict={"tasks": benchmark.tasks, "groups": benchmark.groups, "group_map": {}},
            limit=settings.limit,
            bootstrap_iters=_BOOTSTRAP_RESAMPLES,
            log_samples=True,
            apply_chat_template=settings.chat_template,
            fewshot_as_multiturn=settings.chat_template,
            confirm_run_unsafe_code=settings.run_code,
        )
    return dict(output)


def _metrics(benchmark: Benchmark, output: Mapping[str, Any]) -> dict[str, Metric]:
    """The figures of a group that aggregates those of its tasks, or else of each task."""
    whole = output.get("groups", {}).get(benchmark.name)
    found: dict[str, Metric] = {}
    for task, figures in ({benchmark.name: whole} if whole else output["results"]).items():
        for key, name in _metric_names(figures, _filters(benchmark, task)).items():
            value, error = figures[key], figures.get(key.replace(",", "_stderr,", 1))
            if _is_number(value):
                stderr = float(error) if _is_number(error) else None
                metric = Metric(value=float(value), stderr=stderr, n=figures["sample_len"])
                found[f"{benchmark_key(task)}/{name}"] = metric
    return found


def _filters(benchmark: Benchmark, task: str) -> list[str]:
    """The filters of a task, or else of all tasks of the group, in their own order: lm-eval sorts those of a group."""
    tasks = [benchmark.tasks[task]] if task in benchmark.tasks else benchmark.tasks.values()
    return [each.name for one in tasks for each in getattr(one, "_filters", ())]


def _metric_names(keys: Iterable[str], filters: Sequence[str]) -> dict[str, str]:
    """lm-eval's `metric,filter` of a task -> name; the filter is in it only if it is not the metric's first."""
    pairs = [key.split(",", 1) for key in keys if "," in key]
    found: dict[str, list[str]] = {}
    for metric, filter_name in pairs:
        if not metric.endswith("_stderr"):
            found.setdefault(metric, []).append(filter_name)
    names = {}
    for metric, its_own in found.items():
        first = next((name for name in filters if name in its_own), its_own[0])
        for name in its_own:
            names[f"{metric},{name}"] = metric_part(metric if name == first else f"{metric}_{name}")
    return names


def _items(benchmark: Benchmark, output: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of `BenchmarkResults.items`; what is no number for one item, as a pair for F1, is left out."""
    for task, samples in output["samples"].items():
        names = _metric_names(output["results"][task], _filters(benchmark, task))
        better = output["higher_is_better"].get(task, {})
        generated = benchmark.tasks[task].OUTPUT_TYPE == "generate_until"
        for sample in samples:
            answer = _text(sample["resps"]) if generated else json.dumps(_log_likelihoods(sample["resps"]))
            asked = hashlib.sha256(f"{sample['doc_hash']}{sample['arguments']!r}".encode()).hexdigest()
            for metric in sample["metrics"]:
                if _is_number(sample[metric]):
                    yield {
                        "benchmark": metric_part(benchmark.name if benchmark.pools_items else task),
                        "task": task,
                        "item": sample["doc_id"],
                        "document": asked,
                        "metric": names[f"{metric},{sample['filter']}"],
                        "value": float(sample[metric]),
                        "higher_is_better": better.get(metric) is not False,
                        "answer": answer,
                    }


def _text(responses: Sequence[Sequence[Any]]) -> str:
    """What the model wrote; of a task that asks several times, the first answer."""
    return str(responses[0][0])


def _log_likelihoods(responses: Sequence[Sequence[Any]]) -> list[float]:
    """One for each request of an item; lm-eval pairs those of choices with whether they are greedy."""
    firsts = [response[0] for response in responses]
    return [float(first[0] if isinstance(first, list | tuple) else first) for first in firsts]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)
