"""lm-eval's tasks on one candidate: the metrics, and the value of each item for paired tests (`samq.sweep.significance`).

Tasks run one after another. If one cannot be measured, the results say why, and the others are measured.
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
from samq.evaluation.lm_eval.benchmark_tasks import Benchmark, TaskLibrary, code_allowed, quiet_lm_eval, seeded
from samq.evaluation.lm_eval.harness import GgufLM, explain
from samq.evaluation.lm_eval.room import benchmark_room
from samq.evaluation.measure import Report, write_table
from samq.evaluation.sandbox.run import isolation
from samq.evaluation.settings import BenchmarkRequest, BenchmarkSettings, benchmark_key, metric_part
from samq.files import EVALUATION_NAME, ITEMS_NAME
from samq.llamacpp.fit import choose_gpu_share
from samq.llamacpp.runtime import Model
from samq.markdown import one_line
from samq.output import make_folder
from samq.progress import Progress, silent
from samq.records import Evaluation, Metric

logger = logging.getLogger(__name__)

ITEM_COLUMNS = ["benchmark", "task", "item", "document", "metric", "value", "higher_is_better", "answer"]
_NOT_OURS = "the task's own: SAMQ does not run its code"
_BOOTSTRAP_RESAMPLES = 1000  # for the standard error of metrics that are not means


@dataclass(frozen=True)
class BenchmarkResults:
    """A candidate's results on its tasks.

    `items` has a row for each item and metric, with the columns `ITEM_COLUMNS`:

    - `benchmark`: the name in the settings, as in the metrics' names; `task`: the task of it that the item belongs to.
    - `item`: the item's number; `document`: a hash of its document and of its requests, which differs for other examples
      or another chat template.
    - `metric`: the metric's name without its path; `value`; `higher_is_better`.
    - `answer`: the generated text, or the log-likelihoods of the choices in nats as JSON.
    """

    metrics: dict[str, Metric]
    missing: dict[str, str]  # `eval/TASK` -> why the task was not measured
    items: pd.DataFrame
    environment: dict[str, str]


def benchmark(request: BenchmarkRequest, report: Report) -> Evaluation:
    """Run the request's tasks on its candidate, and write `benchmarks.parquet` and, last, `evaluation.json`.

    The evaluation has the benchmarks' metrics only. Raises SamqError if the candidate cannot be loaded, or if none of the
    tasks can be measured. So nobody stores a failure as a result.
    """
    make_folder(request.output)
    settings = request.settings
    room = partial(benchmark_room, request.benchmarks.context_tokens, settings.kv_type)
    with Model(request.gguf, gpu_layers=choose_gpu_share(request.gguf, settings.gpu_layers, room)) as model:
        results = measure_benchmarks(
            model,
            request.benchmarks,
            kv_type=settings.kv_type,
            threads=settings.threads,
            progress=partial(report, "benchmarks"),
        )
    if results.missing and not results.metrics:
        raise SamqError("; ".join(results.missing.values()))
    write_table(results.items, request.output / ITEMS_NAME)
    evaluation = Evaluation(
        name=request.name,
        sha256=request.sha256,
        metrics=results.metrics,
        missing=results.missing,
        environment=results.environment,
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
    """Run the tasks of the settings on a model, see `run_benchmarks`. Progress counts the requests of one task."""
    lm = GgufLM(model, context_tokens=settings.context_tokens, kv_type=kv_type, threads=threads, progress=progress)
    return run_benchmarks(lm, settings)


def run_benchmarks(lm: LM, settings: BenchmarkSettings) -> BenchmarkResults:
    """Run the tasks of the settings on an lm-eval model, one after another.

    Metrics are named `eval/TASK/METRIC`. If a task has several filters, the metrics of all but the first have the filter in
    their name: `exact_match_flexible-extract`. A group that aggregates its tasks gets metrics in their place; its tasks
    are then among the items only. `missing` names a task as `eval/TASK` if it fails, or if one of its requests fails, as
    lm-eval's metrics are wrong then. Raises SamqError if a folder of tasks is missing or has a malformed file.
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
            task_metrics, task_rows = _metrics(benchmark, output), list(_items(benchmark, output))
        except SamqError as error:
            reason = str(error)
        except Exception as error:  # a task is its author's program; an error in it must not stop the other tasks
            logger.warning("%s failed", name, exc_info=True)
            raised = f"{type(error).__name__}: {one_line(str(error))}"
            reason = f"{name} failed in lm-eval ({raised}); see its log"
        reason = explain(failures) or reason  # the answer to a failed request may have made the task fail
        if reason:
            missing[benchmark_key(name)] = reason
        else:
            metrics |= task_metrics
            rows += task_rows
    return BenchmarkResults(metrics, missing, pd.DataFrame(rows, columns=ITEM_COLUMNS), environment)


def _run(lm: LM, benchmark: Benchmark, settings: BenchmarkSettings) -> dict[str, Any]:
    """lm-eval's results. `simple_evaluate` does the same, but takes a second to describe the machine."""
    for task in benchmark.tasks.values():
        own = task.get_config("num_fewshot")
        if own is None or (
            own != 0 and settings.few_shots is not None
        ):  # 0: the task's prompt has no place for examples
            task.set_config("num_fewshot", settings.few_shots or 0)
        task.set_fewshot_seed(DEFAULT_OTHER_SEED if settings.seed is None else settings.seed)
    with quiet_lm_eval(), code_allowed(settings.run_code):
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
    """The metrics of a group that aggregates its tasks, otherwise of each task."""
    group = output.get("groups", {}).get(benchmark.name)
    metrics: dict[str, Metric] = {}
    for task, values in ({benchmark.name: group} if group else output["results"]).items():
        for key, name in _metric_names(values, _filters(benchmark, task)).items():
            value, error = values[key], values.get(key.replace(",", "_stderr,", 1))
            if _is_number(value):
                stderr = float(error) if _is_number(error) else None
                metric = Metric(value=float(value), stderr=stderr, n=values["sample_len"])
                metrics[f"{benchmark_key(task)}/{name}"] = metric
    return metrics


def _filters(benchmark: Benchmark, task: str) -> list[str]:
    """The filters of a task, or of all tasks of a group, in the tasks' order: lm-eval sorts the filters of a group."""
    tasks = [benchmark.tasks[task]] if task in benchmark.tasks else benchmark.tasks.values()
    return [task_filter.name for task in tasks for task_filter in getattr(task, "_filters", ())]


def _metric_names(keys: Iterable[str], filters: Sequence[str]) -> dict[str, str]:
    """lm-eval's `metric,filter` of a task -> name. The name has the filter only if it is not the metric's first."""
    pairs = [key.split(",", 1) for key in keys if "," in key]
    filters_of: dict[str, list[str]] = {}
    for metric, filter_name in pairs:
        if not metric.endswith("_stderr"):
            filters_of.setdefault(metric, []).append(filter_name)
    names = {}
    for metric, its_own in filters_of.items():
        first = next((name for name in filters if name in its_own), its_own[0])
        for name in its_own:
            names[f"{metric},{name}"] = metric_part(metric if name == first else f"{metric}_{name}")
    return names


def _items(benchmark: Benchmark, output: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of `BenchmarkResults.items`; leaves out metrics that are not a number for one item, such as F1's pairs."""
    for task, samples in output["samples"].items():
        names = _metric_names(output["results"][task], _filters(benchmark, task))
        higher_is_better = output["higher_is_better"].get(task, {})
        generated = benchmark.tasks[task].OUTPUT_TYPE == "generate_until"
        for sample in samples:
            answer = _text(sample["resps"]) if generated else json.dumps(_log_likelihoods(sample["resps"]))
            document = hashlib.sha256(f"{sample['doc_hash']}{sample['arguments']!r}".encode()).hexdigest()
            for metric in sample["metrics"]:
                if _is_number(sample[metric]):
                    yield {
                        "benchmark": metric_part(benchmark.name if benchmark.pools_items else task),
                        "task": task,
                        "item": sample["doc_id"],
                        "document": document,
                        "metric": names[f"{metric},{sample['filter']}"],
                        "value": float(sample[metric]),
                        "higher_is_better": higher_is_better.get(metric) is not False,
                        "answer": answer,
                    }


def _text(responses: Sequence[Sequence[Any]]) -> str:
    """The text that the model wrote; the first answer if the task asks several times."""
    return str(responses[0][0])


def _log_likelihoods(responses: Sequence[Sequence[Any]]) -> list[float]:
    """One for each request of an item; lm-eval pairs the log-likelihoods of choices with whether they are greedy."""
    firsts = [response[0] for response in responses]
    return [float(first[0] if isinstance(first, list | tuple) else first) for first in firsts]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)
