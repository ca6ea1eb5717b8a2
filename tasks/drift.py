"""Task: how the sweep differs from the one before, on the flow run's page."""

from prefect import task
from prefect.artifacts import create_markdown_artifact

from samq.progress import bar
from samq.promotion.last_sweep import last_sweep
from samq.report.drift_report import drift_report
from samq.sweep.drift import drift_of
from samq.sweep.sweep import Sweep
from samq.tracking.mlflow_values import common_params
from samq.tracking.tracked import TrackingSettings


@task(name="compare with the last sweep")
def report_drift(sweep: Sweep, margin: float, tracking: TrackingSettings) -> str | None:
    """The drift report (Markdown), kept as an artifact of the flow run; None if no sweep of this name was tracked."""
    with bar("compare with the last sweep"):
        last = last_sweep(tracking)
        if last is None:
            return None
        inputs = common_params(sweep.made_from)
        last_inputs = {name: value for name, value in last.parameters.items() if name in inputs}
        drift = drift_of(sweep.by_size, inputs, last.run_name, last_inputs, last.candidates, margin)
    markdown = drift_report(drift)
    create_markdown_artifact(markdown, key="requantize-drift", description=f"Against {last.run_name}")
    return markdown
