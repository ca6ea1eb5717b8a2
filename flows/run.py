"""A run of the flow: its name, where it works, how many tasks at a time, and where it is tracked."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from flows.parameters import RequantizeParameters
from samq.home import mlflow_uri
from samq.tracking.tracked import FLOW_RUN, SWEEP_NAME, TrackingSettings
from samq.workspace import Workspace


def workspace_of(parameters: RequantizeParameters) -> Workspace:
    """The store here and the installed llama.cpp, with the parameters' device and limits."""
    model = parameters.model
    return Workspace.here(device=model.device, timeout_s=parameters.timeout_s, memory_limit=model.memory_limit_bytes)


def run_name() -> str:
    """What Prefect's page shows: the run's name and the date."""
    parameters = RequantizeParameters.model_validate(flow_run.get_parameters()["parameters"])
    return f"{parameters.name} {datetime.now():%Y-%m-%d %H:%M}"


def task_runner() -> Any:
    """Two workers: llama-quantize itself uses every core; a second one fills its waits for the disk. Evaluations wait in turn."""
    return ThreadPoolTaskRunner(max_workers=2)


def tracking_settings(
    parameters: RequantizeParameters, model: str, tags: Mapping[str, str] | None = None
) -> TrackingSettings:
    """Where this run of the flow is tracked, under the model's name and the date."""
    return TrackingSettings(
        tracking_uri=parameters.tracking.uri or mlflow_uri(),
        experiment=parameters.tracking.experiment,
        run_name=f"{model} {datetime.now():%Y-%m-%d %H:%M}",
        registered_model=parameters.tracking.registered_model,
        parameters=parameters.model_dump(mode="json"),
        tags={FLOW_RUN: flow_run.get_id() or "", SWEEP_NAME: parameters.name, **(tags or {})},
        cost=parameters.cost,
    )
