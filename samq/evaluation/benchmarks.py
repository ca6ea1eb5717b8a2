"""lm-eval's tasks, put to one candidate: the figures, and each item's for paired statistics (`samq.significance`).

Tasks run one after another: what keeps one from being measured is said of it, and the others are measured.
"""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import pandas as pd
from lm_eval import evaluate
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED

from samq.errors import SamqError
from samq.evaluation.benchmark_tasks import Benchmark, TaskLibrary, code_allowed, quiet, seeded
from samq.evaluation.llama import Model
from samq.evaluation.sandbox import isolation
from samq.evaluation.settings import BenchmarkSettings
from samq.markdown import one_line
from samq.progress import Progress, silent
from samq.records import Metric

logger = logging.getLogger(__name__)

PREFIX = "eval/"
ITEM_COLUMNS = ["benchmark", "task", "item", "document", "metric", "value", "higher_is_better", "answer"]
_BOOTSTRAP_RESAMPLES = 1000  # for the standard error of metrics that are no means


@dataclass
class BenchmarkResults:
    """What a candidate did on its tasks.

    `items` has a row for each item and metric, with ITEM_COLUMNS: what was asked for (`benchmark`), the task of it, the
    item's number and lm-eval's hash of its document, the metric's name without its path, its value, and the answer: the
    text generated, or the log-likelihoods of the choices in nats as JSON.
    """

    metrics: dict[str, Metric] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    items: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=ITEM_COLUMNS))
    environment: dict[str, str] = field(default_factory=dict)


def measure_benchmarks(
    model: Model,
    settings: BenchmarkSettings,
    *,
    kv_type: str = "F16",
    threads: int | None = None,
    progress: Progress = silent,
) -> BenchmarkResults:
    """Put the tasks of the settings to a model; see `run_benchmarks`."""
    from samq.evaluation.harness import GgufLM

    lm = GgufLM(model, context_tokens=settings.context_tokens, kv_type=kv_type, threads=threads)
    return run_benchmarks(lm, settings, progress)


def run_benchmarks(lm: LM, settings: BenchmarkSettings, progress: Progress = silent) -> BenchmarkResults:
    """Put the tasks of the settings to an lm-eval model, one after another.

    Metrics are named `eval/TASK/METRIC`, with the filter after it where a task has several; a group that aggregates its
    tasks is reported in their place. A task that fails is named in `missing` as `eval/TASK`. Raises SamqError if a
    folder of tasks is missing or holds a malformed file.
    """
    library = TaskLibrary(settings.task_folders)
    results = BenchmarkResults(environment={"lm_eval": version("lm-eval")})
    tables = [results.items]
    for done, name in enumerate(settings.tasks):
        progress(done, len(settings.tasks))
        try:
            with seeded(settings.seed):
                benchmark = library.open(name, settings)
                if benchmark.runs_code:
                    results.environment["code_isolation"] = isolation()
                output = _run(lm, benchmark, settings)
            results.metrics |= _metrics(output)
            tables.append(_items(benchmark, output))
        except SamqError as error:
            results.missing[f"{PREFIX}{_legal(name)}"] = str(error)
        except Exception as error:  # a task is a program of its author's, and must not take the others along
            logger.warning("%s failed", name, exc_info=True)
            reason = f"{type(error).__name__}: {one_line(str(error))}"
            results.missing[f"{PREFIX}{_legal(name)}"] = f"{name} failed in lm-eval ({reason}); see the log"
    progress(len(settings.tasks), len(settings.tasks))
    results.items = pd.concat(tables[1:] or tables, ignore_index=True)
    return results


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


def _metrics(output: Mapping[str, Any]) -> dict[str, Metric]:
    """The figures of the groups that aggregate, or else of the tasks."""
    found: dict[str, Metric] = {}
    for task, figures in (output.get("groups") or output["results"]).items():
        names = _metric_names(figures)
        for key, name in names.items():
            metric, filter_name = key.split(",", 1)
            value, error = figures[key], figures.get(f"{metric}_stderr,{filter_name}")
            if _is_number(value):
                stderr = float(error) if _is_number(error) else None
                found[f"{PREFIX}{_legal(task)}/{name}"] = Metric(
                    value=float(value), stderr=stderr, n=figures["sample_len"]
                )
    return found


def _metric_names(keys: Mapping[str, Any] | list[str]) -> dict[str, str]:
    """lm-eval's `metric,filter` of a task -> name; the filter is in it only where the metric has several."""
    pairs = [key.split(",", 1) for key in keys if "," in key]
    pairs = [(metric, filter_name) for metric, filter_name in pairs if not metric.endswith("_stderr")]
    filters = Counter(metric for metric, _ in pairs)
    return {
        f"{metric},{name}": _legal(f"{metric}_{name}" if filters[metric] > 1 else metric).replace("@", "_at_")
        for metric, name in pairs
    }
