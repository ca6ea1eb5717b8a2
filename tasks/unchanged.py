"""Steps: see whether anything changed since the last night, and report that nothing did."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact

from samq.progress import bar
from samq.records import ModelSource, TextSet
from samq.store import Store
from samq.tracking.nights import Night, Unchanged, find_unchanged, night_of, production_sha256
from samq.tracking.tracked import TrackingSettings
from samq.workspace import Workspace
from tasks.stage import step


@step("compare with the last night")
def compare_with_last_night(
    at: Workspace,
    parameters: Mapping[str, Any],
    source: ModelSource,
    texts: Sequence[TextSet],
    files: Sequence[Path],
    tracking: TrackingSettings,
) -> tuple[Night, Unchanged | None]:
    """The fingerprint of tonight's sweep, and the last sweep if that had the same.

    `parameters` are those that the sweep depends on, and `files` what they name.
    """
    with bar("compare with the last night"):
        night = night_of(parameters, source, texts, at.toolchain, files, production_sha256(tracking))
        return night, find_unchanged(tracking, night, Store(at.store))


@task(name="report")
def report_unchanged(unchanged: Unchanged) -> None:
    """Say on the flow run's page that nothing changed, and where the report is."""
    links = unchanged.tracked.links(unchanged.tracked.tracking_uri.rstrip("/"))
    where = f"[Report]({links['report']})" if unchanged.tracked.tracking_uri.startswith("http") else ""
    create_markdown_artifact(
        f"{unchanged.summary} {where}".rstrip(), key="requantize-report", description="Nothing has changed"
    )
