"""The benchmarks of a sweep: joined to the candidates that were asked, and compared item by item."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pandas as pd
from pydantic import Field

from samq.errors import SamqError
from samq.files import ANSWERS_NAME, EVALUATION_NAME, ITEMS_NAME
from samq.records import Evaluation, Record
from samq.sweep.selection import Result
from samq.sweep.significance import JSON_ITEMS, PairedComparison, compare_items

_COLUMNS = ["benchmark", "metric", "task", "item", "document", "value", "higher_is_better"]  # all that is compared

logger = logging.getLogger(__name__)

PRODUCTION = "production"  # what the model in production is called among the references


class Candidate(Record):
    """A GGUF that is put to benchmarks: known by its content, whatever it is called and wherever it lies."""

    SCHEMA: ClassVar[str] = "samq.benchmarked-candidate/1"
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"name", "gguf"})

    name: str = Field(description="what it is called among candidates")
    gguf: Path
    sha256: str = Field(description="SHA-256 of that file")


def with_benchmarks(result: Result, folders: Sequence[Path], missing: Mapping[str, str]) -> Result:
    """The result with what was measured in the benchmarks' folders, and the tasks that were not, with the reason."""
    parts = [result.evaluation, *(Evaluation.load(folder / EVALUATION_NAME) for folder in folders)]
    evaluation = result.evaluation.model_copy(
        update={
            "metrics": {name: metric for part in parts for name, metric in part.metrics.items()},
            "missing": {what: why for part in parts for what, why in part.missing.items()} | dict(missing),
            "environment": {key: value for part in parts for key, value in part.environment.items()},
        }
    )
    return replace(result, evaluation=evaluation, benchmark_folders=tuple(folders))


def items_of(result: Result) -> pd.DataFrame:
    """All benchmark items of a candidate, see `samq.evaluation.lm_eval.benchmarks`; empty if it was asked none."""
    tables = [pd.read_parquet(folder / ITEMS_NAME) for folder in result.benchmark_folders]
    tables = [table for table in tables if len(table)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def join_items(answers: pd.DataFrame | None, benchmarks: pd.DataFrame | None) -> pd.DataFrame:
    """One table of the JSON prompts' answers (id, valid) and the benchmarks' items (None: not measured)."""
    tables = [] if benchmarks is None else [benchmarks[_COLUMNS]]
    if answers is not None:
        benchmark, metric = JSON_ITEMS.split("/")
        named = {"benchmark": benchmark, "metric": metric, "task": benchmark, "higher_is_better": True}
        tables.append(
            pd.DataFrame(
                {"item": answers["id"], "document": answers["id"], "value": answers["valid"].astype(float), **named}
            )
        )
    return pd.concat(tables) if tables else pd.DataFrame(columns=_COLUMNS, dtype=object)


def compared_items(result: Result) -> pd.DataFrame:
    """What a candidate is compared by: its answers to JSON prompts, and its benchmark items."""
    answers, items = result.folder / ANSWERS_NAME, items_of(result)
    return join_items(pd.read_parquet(answers) if answers.is_file() else None, items if len(items) else None)


def compare_benchmarks(
    results: Sequence[Result], margin: float, production: pd.DataFrame | None = None
) -> list[PairedComparison]:
    """Every quantized candidate against full precision, and against what is in production, on what both were asked.

    `production` are the items of the latter; a benchmark that it was asked otherwise is left out, with a warning. Raises
    SamqError if two candidates of the sweep were asked other items of one benchmark.
    """
    tables = {result.name: compared_items(result) for result in results}
    full = next((result.name for result in results if result.plan.policy == "full"), None)
    benchmarked = [name for name, items in tables.items() if name != full and len(items)]
    comparisons: list[PairedComparison] = []
    for name in benchmarked:
        if full is not None and len(tables[full]):
            comparisons += compare_items(name, tables[name], full, tables[full], margin=margin)
        if production is not None and len(production):
            comparisons += _against_production(name, tables[name], production, margin)
    return comparisons


def _against_production(
    name: str, items: pd.DataFrame, production: pd.DataFrame, margin: float
) -> Iterator[PairedComparison]:
    for benchmark, mine in items.groupby("benchmark", sort=False):
        theirs = production[production["benchmark"] == benchmark]
        try:
            yield from compare_items(name, mine, PRODUCTION, theirs, margin=margin)
        except SamqError as error:  # tonight's settings are others than those of that night
            logger.warning("%s is not compared with production on %s: %s", name, benchmark, error)
