"""Task: find the model."""

from pathlib import Path

from samq.sensitivity.hf_model import describe_source
from samq.progress import bar
from samq.records import ModelSource
from tasks.stage import retried


@retried("find model", run_name="find {source}")
def find_model(source: str, revision: str | None, hf_folder: Path | None) -> ModelSource:
    """Resolve (and for a hub id download) the model and digest its files. Not cached: only reading tells of change."""
    with bar(f"find {source}", in_bytes=True) as progress:
        return describe_source(source, revision=revision, hf_folder=hf_folder, progress=progress)
