"""The benchmarks of a sweep: joined to the candidates that were asked, and compared item by item."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from samq.evaluation.settings import EVALUATION_NAME
from samq.records import Evaluation
from samq.selection import Result
from samq.significance import ITEMS_NAME, PairedComparison, compare_items

PRODUCTION = "production"  # what the model in production is called among the references


def with_benchmarks(result: Result, folders: Sequence[Path], missing: Mapping[str, str]) -> Result:
    """The result with what was measured in the benchmarks' folders, and the tasks that were not, with the reason."""
    made = [Evaluation.load(folder / EVALUATION_NAME) for folder in folders]
    evaluation = result.evaluation
    for one in made:
        evaluation = evaluation.model_copy(
            update={
                "metrics": evaluation.metrics | one.metrics,
                "missing": evaluation.missing | one.missing,
                "environment": evaluation.environment | one.environment,
            }
        )
    evaluation = evaluation.model_copy(update={"missing": {**evaluation.missing, **missing}})
    return replace(result, evaluation=evaluation, benchmark_folders=tuple(folders))


def items_of(result: Result) -> pd.DataFrame:
    """All benchmark items of a candidate, see `samq.evaluation.benchmarks`; empty if it was asked none."""
    tables = [pd.read_parquet(folder / ITEMS_NAME) for folder in result.benchmark_folders]
    tables = [table for table in tables if len(table)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def compare_benchmarks(
    results: Sequence[Result], margin: float, production: pd.DataFrame | None = None
) -> list[PairedComparison]:
    """Every quantized candidate that was asked against full precision, and against what is in production.

    `production` are the items of the latter. Raises SamqError if two were asked other items of one benchmark.
    """
    tables = {result.name: items_of(result) for result in results}
    full = next((result.name for result in results if result.plan.policy == "full"), None)
    references = [(full, tables[full])] if full is not None else []
    references += [(PRODUCTION, production)] if production is not None else []
    return [
        comparison
        for result in results
        if result.name != full and len(tables[result.name])
        for reference, items in references
        if len(items)
        for comparison in compare_items(result.name, tables[result.name], reference, items, margin=margin)
    ]
