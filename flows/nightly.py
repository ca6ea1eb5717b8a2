"""Re-quantize every night, unless nothing changed since the last one.

model + texts + programs -> compare with the last night -> the flow `requantize`, or a report that says so

The pipeline is imported only if it runs: that takes longer than the rest of a night on which nothing changed.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import flow

from flows.parameters import RequantizeParameters
from flows.run import run_name, task_runner, tracking_settings, workspace_of
from samq.tracking.nights import Night, Unchanged
from tasks.source import find_model
from tasks.text import load_text
from tasks.unchanged import compare_with_last_night, report_unchanged

if TYPE_CHECKING:
    from flows.requantize import FinishedSweep

logging.getLogger("samq").setLevel(logging.INFO)  # in a worker nobody else does


@flow(name="nightly", flow_run_name=run_name, task_runner=task_runner())
def nightly(parameters: RequantizeParameters) -> "FinishedSweep | Unchanged":
    """Run the flow `requantize`, unless its sweep would be as the last one: then say so, and do nothing."""
    night, unchanged = last_night(parameters)
    if unchanged:
        report_unchanged(unchanged)
        return unchanged
    from flows.requantize import finish_sweep

    return finish_sweep(parameters, night.tags)


def last_night(parameters: RequantizeParameters) -> tuple[Night, Unchanged | None]:
    """The fingerprint of the sweep to come, and the last sweep if nothing changed since; takes seconds."""
    model, benchmarks = parameters.model, parameters.benchmarks
    source = find_model(model.source, model.revision, model.hf_folder)
    texts = [load_text(parameters.calibration.dataset), load_text(parameters.heldout)]
    files = [Path(task) for task in benchmarks.tasks if task.endswith(".yaml")] + [*benchmarks.task_folders]
    asked = parameters.model_dump(mode="json", exclude={"name": True, "timeout_s": True})
    return compare_with_last_night(
        workspace_of(parameters), asked, source, texts, files, tracking_settings(parameters, source.name)
    )
