"""Task: find the model."""

from pathlib import Path

from prefect import task

from samq.model import describe_source
from samq.progress import bar
from samq.records import ModelSource
from tasks.stage import RETRY_DELAYS_S, is_transient


@task(
    name="find model",
    task_run_name="find {source}",
    retries=len(RETRY_DELAYS_S),
    retry_delay_seconds=RETRY_DELAYS_S,
    retry_condition_fn=is_transient,
)
def find_model(source: str, revision: str | None, hf_folder: Path | None) -> ModelSource:
    """Resolve (and for a hub id download) the model and digest its files. Not cached: only reading tells of change."""
    with bar(f"find {source}"):
        return describe_source(source, revision=revision, hf_folder=hf_folder)
