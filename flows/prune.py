"""Delete what the store no longer needs, or say what that would be.

find what is not needed -> delete
"""

import logging
from pathlib import Path
from typing import Any

from prefect import flow
from pydantic import Field

from flows.parameters import Parameters, TrackingUri
from samq.home import mlflow_uri, store_folder
from samq.settings_file import read_settings
from samq.shared_store import shared_store
from samq.store import Store
from samq.tracking.pruning import PruneRules, Unneeded, find_unneeded, remove_unneeded

log = logging.getLogger("samq.prune")
logging.getLogger("samq").setLevel(logging.INFO)  # in a worker nobody else does


class PruneParameters(Parameters):
    """One run of the flow."""

    rules: PruneRules = Field(description="what may go")
    delete: bool = Field(default=False, description="delete it; false: only say what would go")
    tracking_uri: TrackingUri | None = Field(default=None, description="MLflow's; default: SQLite in the SAMQ folder")


@flow(name="prune")
def prune(parameters: PruneParameters) -> Unneeded:
    """Find what is not needed, and delete it if the parameters say so.

    Raises SamqError, and deletes nothing, if a file that an alias points at is missing.
    """
    store, shared = Store(store_folder()), shared_store()
    unneeded = find_unneeded(store, shared, parameters.tracking_uri or mlflow_uri(), parameters.rules)
    for stage, (count, size) in unneeded.by_stage().items():
        log.info("%s: %d artifacts, %.1f MB", stage, count, size / 1e6)
    if parameters.delete:
        remove_unneeded(store, shared, unneeded)
    done = "freed" if parameters.delete else "would free"
    log.info("%s %.1f of %.1f MB", done, unneeded.bytes / 1e6, unneeded.bytes_of_all / 1e6)
    return unneeded


def read_prune_parameters(path: str) -> dict[str, Any]:
    """A build step for prefect.yaml: the validated file, as the deployment's `parameters`."""
    parameters = read_settings(Path(path), PruneParameters, "deployments/prune.yaml")
    return {"parameters": parameters.model_dump(mode="json", exclude_defaults=True)}
