"""Nights on which nothing changed: a fingerprint of all that a sweep depends on, and the sweep that had it last."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from samq.errors import SamqError
from samq.llamacpp.toolchain import converter_build, python_library_build
from samq.records import ModelSource, TextSet, Toolchain, digest_of
from samq.store import Store
from samq.tracking.registry import PRODUCTION_ALIAS, aliases, connect, find_version, mlflow_errors, model_names
from samq.tracking.tracked import (
    FAILURES,
    REGISTERED,
    TrackedSweep,
    TrackingSettings,
    newest_run,
    registered_version,
    tracked_sweep,
)

QUESTION = "samq.question"  # tag of a parent run: digest of the parameters
FINGERPRINT = "samq.fingerprint"  # tag of a parent run: digest of the parameters and all that they name
UNCHANGED = "samq.unchanged"  # tag of a parent run: when a later run last found nothing changed
_PACKAGES = ("torch", "transformers", "llama-cpp-python", "gguf", "lm-eval", "numpy", "datasets")
_CODE = ("samq", "tasks", "flows")
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Night:
    """What a sweep asks, and what it asks it of. Both are digests."""

    question: str
    fingerprint: str

    @property
    def tags(self) -> dict[str, str]:
        """Tags of the parent run by which a later night finds this one."""
        return {QUESTION: self.question, FINGERPRINT: self.fingerprint}


@dataclass(frozen=True)
class Unchanged:
    """A sweep of the same inputs as tonight's would be."""

    tracked: TrackedSweep
    run_name: str
    since: datetime

    @property
    def summary(self) -> str:
        """One sentence for a page or a terminal."""
        tracked = self.tracked
        best = f"; the best is still {tracked.registered_model} version {tracked.model_version}"
        return (
            f"Nothing has changed since {self.run_name}: model, texts, parameters and programs are the same"
            f"{best if tracked.model_version else ''}."
        )


def night_of(
    parameters: Mapping[str, Any],
    source: ModelSource,
    texts: Iterable[TextSet],
    toolchain: Toolchain,
    files: Sequence[Path],
    production: str | None,
) -> Night:
    """The fingerprint of a sweep.

    `files` are files and folders that the parameters name, such as benchmark tasks. `production` is the SHA-256 of what serves,
    if the sweep is compared with it.
    """
    contents = {
        "parameters": parameters,
        "source": source.digest(),
        "texts": [text.digest() for text in texts],
        "toolchain": [toolchain.digest(), converter_build(toolchain), python_library_build()],
        "packages": {name: version(name) for name in _PACKAGES},
        "code": _digest([path for name in _CODE for path in _files_below(_ROOT / name) if path.suffix == ".py"]),
        "files": [_digest(_files_below(path)) for path in files],
        "production": production,
    }
    return Night(digest_of(dict(parameters)), digest_of(contents))


def find_unchanged(settings: TrackingSettings, night: Night, store: Store) -> Unchanged | None:
    """The last sweep that asked this, if all that it depended on is as it was, it lost nothing, and its best is still there."""
    client = connect(settings.tracking_uri)
    with mlflow_errors(client, f"no experiment {settings.experiment}"):
        parent = newest_run(client, settings, f"tags.`{QUESTION}` = '{night.question}'")
        if parent is None or not _is_as_it_was(client, parent, settings, night, store):
            return None
        client.set_tag(parent.info.run_id, UNCHANGED, f"{datetime.now():%Y-%m-%d %H:%M}")
        tracked = tracked_sweep(client, settings.tracking_uri, parent)
    return Unchanged(tracked, parent.info.run_name, datetime.fromtimestamp(parent.info.start_time / 1000))


def _is_as_it_was(client: MlflowClient, parent: Run, settings: TrackingSettings, night: Night, store: Store) -> bool:
    tags = parent.data.tags
    if parent.info.status != "FINISHED" or tags.get(FINGERPRINT) != night.fingerprint or tags.get(FAILURES):
        return False
    if not settings.registered_model or REGISTERED not in tags:
        return True
    registered = registered_version(tags)
    if registered is None:  # it failed
        return False
    try:
        gguf = find_version(client, *registered)
    except SamqError:  # somebody deleted it
        return False
    return gguf.sha256 in store.having({gguf.sha256})


def production_sha256(settings: TrackingSettings) -> str | None:
    """SHA-256 of the version in production, or its number if SAMQ did not register it; None if there is none."""
    name = settings.registered_model
    client = connect(settings.tracking_uri)
    if not name or name not in model_names(client):
        return None
    serving = aliases(client, name).get(PRODUCTION_ALIAS)
    try:
        return find_version(client, name, serving).sha256 if serving else None
    except SamqError:  # SAMQ did not register it
        return serving


def _files_below(path: Path) -> list[Path]:
    return sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]


def _digest(files: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        content = path.read_bytes() if path.is_file() else b""
        whole.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()
