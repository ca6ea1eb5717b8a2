"""The sweep before, as MLflow has it."""

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run

from samq.errors import SamqError
from samq.files import DIVERGENCE_NAME
from samq.promotion.evidence import read_measured, read_plan, reading
from samq.sweep.drift import LastCandidate
from samq.tracking.registry import connect, mlflow_errors
from samq.tracking.tracked import FINISHED, SWEEP_NAME, TrackingSettings, finished_candidates, newest_run

logger = logging.getLogger(__name__)

_FILE_BYTES = "memory/file_bytes"


@dataclass(frozen=True)
class LastSweep:
    """A tracked sweep."""

    run_name: str
    parameters: Mapping[str, str]  # of its run
    candidates: tuple[LastCandidate, ...]


def last_sweep(settings: TrackingSettings) -> LastSweep | None:
    """The newest finished sweep of this name; None if there is none. A candidate that cannot be read is left out."""
    client = connect(settings.tracking_uri)
    with mlflow_errors(client, f"no experiment {settings.experiment}"):
        query = f"tags.`{SWEEP_NAME}` = '{settings.tags.get(SWEEP_NAME, '')}' and {FINISHED}"
        parent = newest_run(client, settings, query)
        if parent is None:
            return None
        children = finished_candidates(client, parent)
    candidates = []
    for child in children:
        try:
            with reading(f"{child.info.run_name} of the last sweep"):
                candidates.append(_candidate(client, child))
        except SamqError as error:
            logger.warning("%s", error)
    return LastSweep(parent.info.run_name, parent.data.params, tuple(candidates))


def _candidate(client: MlflowClient, run: Run) -> LastCandidate:
    name = run.info.run_name
    measured = read_measured(client, run, name)
    return LastCandidate(
        name=name,
        plan=read_plan(client, run),
        evaluation=measured.evaluation,
        bytes=int(run.data.metrics[_FILE_BYTES]),
        items=measured.items,
        tokens=_tokens(client, run),
    )


def _tokens(client: MlflowClient, run: Run) -> pd.DataFrame | None:
    paths = {Path(file.path).name: file.path for file in client.list_artifacts(run.info.run_id, "evaluation")}
    if DIVERGENCE_NAME not in paths:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return pd.read_parquet(client.download_artifacts(run.info.run_id, paths[DIVERGENCE_NAME], folder))
