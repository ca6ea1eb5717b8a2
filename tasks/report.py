"""Task: the report, in words and tables, on the flow run's page."""

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from samq.sweep.cost import CostSettings
from samq.records import CalibrationSet, ModelSource, PredictionCheck, TextSet, Toolchain
from samq.report.markdown_report import markdown_report, results_table
from samq.sweep.selection import Comparison, Failure, Result, SelectionRule
from samq.sweep.significance import PairedComparison


@task(name="report")
def report(
    source: ModelSource,
    calibration: CalibrationSet,
    heldout: TextSet,
    toolchain: Toolchain,
    results: list[Result],
    failures: list[Failure],
    best: Result | None,
    rule: SelectionRule,
    comparisons: list[Comparison],
    checks: list[PredictionCheck],
    benchmarks: list[PairedComparison],
    cost: CostSettings | None,
) -> str:
    """Write the report (Markdown), and keep it and its table as artifacts of the flow run."""
    markdown = markdown_report(
        source,
        calibration,
        heldout,
        toolchain,
        results,
        failures,
        best,
        rule,
        comparisons,
        checks,
        benchmarks,
        cost,
    )
    create_markdown_artifact(markdown, key="requantize-report", description=f"Sweep of {source.name}")
    table = results_table(results, failures).astype(object)
    rows = table.where(table.notna(), None).to_dict("records")
    create_table_artifact(rows, key="requantize-candidates", description=f"Candidates of {source.name}")
    return markdown
