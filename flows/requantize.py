"""Re-quantize a model: from full-precision weights and calibration text to measured, tracked, registered GGUFs.

model + text -> convert -> agreement -> inputs -> calibrate -> price -> plan x N -> build x N -> evaluate x N
             -> compare -> choose -> benchmark the finalists -> check -> report -> track -> register

`measure_sweep` goes as far as the checks and needs no server: commands, notebooks and benchmarks call it. The flow
`requantize` is that and the rest.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from prefect import flow
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from flows.benchmarks import benchmark_finalists
from flows.checks import check_predictions
from flows.costs import measure_costs
from flows.gather import Gather
from flows.ggufs import build
from flows.inputs import prepare
from flows.parameters import RequantizeParameters
from flows.plans import plan_candidates
from flows.results import load_results, require_candidates
from samq.home import mlflow_uri
from samq.sweep.sweep import Sweep
from samq.tracking.nights import Night, Unchanged
from samq.tracking.tracked import FLOW_RUN, SWEEP_NAME, TrackedSweep, TrackingSettings
from samq.workspace import Workspace
from tasks.benchmark import compare_with_references, find_benchmarks
from tasks.compare import compare
from tasks.drift import report_drift
from tasks.drop import drop_files
from tasks.evaluate import evaluate
from tasks.plan import FULL, plan_stock
from tasks.price import choose_types
from tasks.report import report
from tasks.source import find_model
from tasks.text import load_text
from tasks.track import track
from tasks.unchanged import compare_with_last_night, report_unchanged

logging.getLogger("samq").setLevel(logging.INFO)  # in a worker nobody else does


def workspace_of(parameters: RequantizeParameters) -> Workspace:
    """The store here and the installed llama.cpp, with the parameters' device and limits."""
    model = parameters.model
    return Workspace.here(device=model.device, timeout_s=parameters.timeout_s, memory_limit=model.memory_limit_bytes)


def measure_sweep(at: Workspace, parameters: RequantizeParameters) -> Sweep:
    """Build, measure and compare every candidate; one that fails is among the failures and does not stop the others."""
    candidates, evaluation, gather = parameters.candidates, parameters.evaluation, Gather()

    # What every candidate is made from and measured against.
    inputs = prepare(at, parameters)
    tasks = find_benchmarks(parameters.benchmarks.settings)

    # What each tensor costs in each type.
    mixtures = {name: plan_stock.submit(at, inputs.target, name) for name in (FULL, *candidates.mixtures)}
    stock = gather("plan", mixtures)
    types = choose_types(at, inputs.target, candidates.ladder_types, list(stock.values()), candidates.threshold_policy)
    costs = measure_costs(at, inputs, types, parameters)

    # The candidates: a plan each, built and measured.
    plans = stock | plan_candidates(at, inputs, costs, candidates, gather)
    ggufs = build(at, inputs, plans, costs, gather)
    evaluations = gather(
        "evaluate",
        {
            name: evaluate.submit(at, name, gguf, inputs.heldout, inputs.baseline, evaluation)
            for name, gguf in ggufs.items()
        },
    )
    require_candidates(evaluations, gather.failures)

    # The comparison, the choice, and benchmarks for the candidates that could still be chosen.
    results = load_results(plans, ggufs, evaluations, costs.tables)
    sweep = compare(
        Sweep(inputs.made_from, costs.sensitivity, results, rule=parameters.selection, routing=costs.routing)
    )
    sweep = benchmark_finalists(at, sweep, tasks, parameters)

    # How far the predictions can be trusted; then the failures of all stages are known.
    checks = check_predictions(at, inputs, plans, ggufs, costs, parameters, gather)
    return replace(sweep, checks=checks, failures=tuple(gather.failures))


@dataclass(frozen=True)
class FinishedSweep:
    """A sweep, its report in Markdown, and where it is tracked."""

    sweep: Sweep
    report: str
    tracked: TrackedSweep


def run_name() -> str:
    """What Prefect's page shows: the run's name and the date."""
    parameters = RequantizeParameters.model_validate(flow_run.get_parameters()["parameters"])
    return f"{parameters.name} {datetime.now():%Y-%m-%d %H:%M}"


@flow(
    name="requantize",
    flow_run_name=run_name,
    # llama-quantize itself uses every core; a second worker fills its waits for the disk. Evaluations wait in turn.
    task_runner=ThreadPoolTaskRunner(max_workers=2),  # type: ignore[arg-type]
)
def requantize(parameters: RequantizeParameters, skip_unchanged: bool = False) -> FinishedSweep | Unchanged:
    """Measure a sweep, compare it with what is in production, report and track it, and register the best candidate.

    With `skip_unchanged`, a run that would be as the last one says so, and does nothing.
    """
    at = workspace_of(parameters)
    tags = {}
    if skip_unchanged:
        night, unchanged = last_night(at, parameters)
        if unchanged:
            report_unchanged(unchanged)
            return unchanged
        tags = night.tags
    sweep = measure_sweep(at, parameters)
    tracking = tracking_settings(parameters, sweep.made_from.source.name, tags)
    sweep = compare_with_references(sweep, parameters.benchmarks.margin, tracking)
    markdown = report(sweep, parameters.cost)
    drift = report_drift(sweep, parameters.benchmarks.margin, tracking)
    tracked = track(tracking, sweep, markdown, drift)
    if parameters.candidates.keep != "all":
        drop_files(at, sweep, parameters.candidates.keep, tracking.tracking_uri)
    return FinishedSweep(sweep, markdown, tracked)


def last_night(at: Workspace, parameters: RequantizeParameters) -> tuple[Night, Unchanged | None]:
    """The fingerprint of the sweep to come, and the last sweep if nothing changed since; takes seconds."""
    model, benchmarks = parameters.model, parameters.benchmarks
    source = find_model(model.source, model.revision, model.hf_folder)
    texts = [load_text(parameters.calibration.dataset), load_text(parameters.heldout)]
    files = [Path(task) for task in benchmarks.tasks if task.endswith(".yaml")] + [*benchmarks.task_folders]
    asked = parameters.model_dump(mode="json", exclude={"name": True, "timeout_s": True})
    return compare_with_last_night(at, asked, source, texts, files, tracking_settings(parameters, source.name))


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
