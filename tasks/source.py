"""Task: find the model."""

from pathlib import Path

from samq.progress import bar
from samq.records import ModelSource
from samq.sensitivity.checkpoint import describe_source
from tasks.stage import RETRY_DELAYS_S, step


@step("find model", run_name="find {source}", retries=len(RETRY_DELAYS_S))
def find_model(source: str, revision: str | None = None, hf_folder: Path | None = None) -> ModelSource:
    """Resolve (and for a hub id download) the model and digest its files. Not cached: only reading tells of change."""
    with bar(f"find {source}", in_bytes=True) as progress:
        return describe_source(source, revision=revision, hf_folder=hf_folder, progress=progress)
