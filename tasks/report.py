"""Task: the report, in words and tables, on the flow run's page."""

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from samq.report.markdown_report import markdown_report
from samq.report.table import results_table
from samq.sweep.serving_cost import CostSettings
from samq.sweep.sweep import Sweep


@task(name="report")
def report(sweep: Sweep, cost: CostSettings | None) -> str:
    """Write the report (Markdown), and keep it and its table as artifacts of the flow run."""
    markdown, name = markdown_report(sweep, cost), sweep.made_from.source.name
    create_markdown_artifact(markdown, key="requantize-report", description=f"Sweep of {name}")
    table = results_table(sweep).astype(object)
    rows = table.where(table.notna(), None).to_dict("records")
    create_table_artifact(rows, key="requantize-candidates", description=f"Candidates of {name}")
    return markdown
