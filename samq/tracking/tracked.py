"""Where a sweep is to be tracked, and where it is then to be found: links that answer what people ask."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from mlflow import MlflowClient
from mlflow.entities import Experiment, Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from pydantic import BaseModel, ConfigDict, Field

from samq.sweep.serving_cost import CostSettings
from samq.tracking import mlflow_view
from samq.tracking.registry import CANDIDATE_ALIAS

FLOW_RUN = "prefect.flow_run"  # tag of a parent run: the id of the Prefect flow run that tracked it
REGISTERED = "samq.registered"  # tag of a parent run: the version that its best candidate is, or why it is none
FINISHED = "attributes.status = 'FINISHED'"  # in a search
SWEEP_NAME = "samq.sweep"  # tag of a parent run: the name of the run in the parameters
FAILURES = "samq.failures"  # tag of a parent run: the candidates that were lost, and why
SWEEPS = "tags.`samq.candidates` != ''"  # finds the parent runs
_MODELS = "workflowType=machine_learning"  # else MLflow shows its pages for prompts and agents


class TrackingSettings(BaseModel):
    """Where a sweep is logged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tracking_uri: str = Field(description="sqlite:///FILE, or the address of an MLflow server")
    experiment: str
    run_name: str
    registered_model: str | None = Field(default=None, description="register the best candidate under this name")
    artifact_location: str | None = Field(
        default=None,
        description="of a new experiment; None: mlartifacts beside the SQLite file, or what the server decides",
    )
    parameters: dict[str, Any] = Field(default={}, description="what the sweep was asked to do; may be nested")
    tags: dict[str, str] = Field(default={}, description="further tags of the parent run")
    cost: CostSettings | None = Field(default=None, description="what a GPU costs, for the metrics `cost/...`")


@dataclass(frozen=True)
class TrackedSweep:
    """Where a sweep is to be found in MLflow and Prefect."""

    tracking_uri: str
    experiment_id: str
    parent_run_id: str
    child_run_ids: dict[str, str]  # of the candidates that were measured
    registered_model: str | None = None
    model_version: str | None = None
    not_registered: str | None = None  # why the best is not, though a name for it was given
    flow_run_id: str | None = None
    types_figure: str | None = None  # the figure of the plans' types, of those in the artifacts' folder `figures`

    def links(self, mlflow: str, prefect: str | None = None) -> dict[str, str]:
        """What a page answers -> its address, on the servers at these addresses."""
        experiment = f"{mlflow}/#/experiments/{self.experiment_id}"
        run = f"{experiment}/runs/{self.parent_run_id}"
        view = f"{experiment}/runs?{_MODELS}&viewStateShareKey={mlflow_view.KEY}"
        ids = quote(json.dumps(list(self.child_run_ids.values())))
        links = {
            "report": f"{run}?{_MODELS}",
            "candidates": view,
            "charts": f"{view}&compareRunsMode=CHART",
            "compare": f"{mlflow}/#/compare-runs?runs={ids}&experiments=%5B%22{self.experiment_id}%22%5D&{_MODELS}",
            "Pareto plot": f"{run}/artifacts/figures/pareto.png?{_MODELS}",
        }
        if self.types_figure:
            links["where the bits went"] = f"{run}/artifacts/figures/{self.types_figure}?{_MODELS}"
        if self.registered_model and self.model_version:
            name = quote(self.registered_model)
            links["registered model"] = f"{mlflow}/#/models/{name}/versions/{self.model_version}?{_MODELS}"
        if prefect and self.flow_run_id:
            links["flow run"] = f"{prefect}/runs/flow-run/{self.flow_run_id}"
        return links

    def summary(self) -> list[str]:
        """Lines that tell a person at a terminal where to look."""
        lines = []
        if self.tracking_uri.startswith("http"):
            lines.append(f"report: {self.links(self.tracking_uri.rstrip('/'))['report']}")
        if self.registered_model:
            lines.append(f"registered: {self.registered_model} version {self.model_version}, alias {CANDIDATE_ALIAS}")
        if self.not_registered:
            lines.append(f"not registered: {self.not_registered}; run the sweep again: everything measured is kept")
        return lines


def start_page(mlflow: str) -> str:
    """Address of MLflow's experiments at this server, with the pages for models."""
    return f"{mlflow}/#/experiments?{_MODELS}"


def registered_version(tags: Mapping[str, str]) -> tuple[str, str] | None:
    """Name and version that the best candidate of a sweep is registered as, by its parent run's tags; None if it is none."""
    registered = re.fullmatch(r"([^:/]+) version (\d+)", tags.get(REGISTERED, ""))  # else it says why not
    return (registered[1], registered[2]) if registered else None


def latest_sweep(client: MlflowClient, tracking_uri: str) -> TrackedSweep | None:
    """The sweep that was tracked last; None if there is none."""
    parents = newest_runs(client, client.search_experiments(), f"{SWEEPS} and {FINISHED}", 1)
    return tracked_sweep(client, tracking_uri, parents[0]) if parents else None


def newest_runs(client: MlflowClient, experiments: Iterable[Experiment], query: str, count: int) -> list[Run]:
    """The newest runs that a query finds, newest first."""
    ids, order = [experiment.experiment_id for experiment in experiments], ["attributes.start_time DESC"]
    return list(client.search_runs(ids, query, order_by=order, max_results=count))


def newest_run(client: MlflowClient, settings: TrackingSettings, query: str) -> Run | None:
    """The newest run of the settings' experiment that a query finds; None if there is none."""
    experiment = client.get_experiment_by_name(settings.experiment)
    runs = newest_runs(client, [experiment], query, 1) if experiment else []
    return runs[0] if runs else None


def finished_candidates(client: MlflowClient, parent: Run) -> list[Run]:
    """The runs of the candidates that a sweep has measured, by its parent run."""
    query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent.info.run_id}' and {FINISHED}"
    return list(client.search_runs([parent.info.experiment_id], query))


def tracked_sweep(client: MlflowClient, tracking_uri: str, parent: Run) -> TrackedSweep:
    """Where the sweep of this parent run is."""
    children = finished_candidates(client, parent)
    name, version = registered_version(parent.data.tags) or (None, None)
    figures = [figure.path.removeprefix("figures/") for figure in client.list_artifacts(parent.info.run_id, "figures")]
    return TrackedSweep(
        tracking_uri=tracking_uri,
        experiment_id=parent.info.experiment_id,
        parent_run_id=parent.info.run_id,
        child_run_ids={child.info.run_name: child.info.run_id for child in children},
        registered_model=name,
        model_version=version,
        flow_run_id=parent.data.tags.get(FLOW_RUN) or None,
        types_figure=types_figure(figures),
    )


def types_figure(figures: Collection[str]) -> str | None:
    """The figure that shows which types the tensors have: of the budgets' plans, else of the best candidate."""
    return next((name for name in ("budgets.png", "types.png") if name in figures), None)
