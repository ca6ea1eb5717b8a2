"""Re-quantize a model: from full-precision weights and calibration text to measured, tracked, registered GGUFs.

model + text -> convert -> agreement -> inputs -> calibrate -> price -> plan x N -> build x N -> evaluate x N
             -> compare -> choose -> benchmark the finalists -> check -> report -> track -> register

`measure_sweep` goes as far as the checks and needs no server: commands, notebooks and benchmarks call it. The flow
`requantize` is that and the rest.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from prefect import flow

from flows.benchmarks import benchmark_finalists
from flows.checks import check_predictions
from flows.costs import measure_costs
from flows.gather import Gather
from flows.ggufs import build
from flows.inputs import prepare
from flows.parameters import RequantizeParameters
from flows.plans import plan_candidates
from flows.results import load_results, require_candidates
from flows.run import run_name, task_runner, tracking_settings, workspace_of
from samq.sweep.sweep import Sweep
from samq.tracking.tracked import TrackedSweep
from samq.workspace import Workspace
from tasks.benchmark import compare_with_references, find_benchmarks
from tasks.compare import compare
from tasks.drift import report_drift
from tasks.drop import drop_files
from tasks.evaluate import evaluate
from tasks.plan import FULL, plan_stock
from tasks.price import choose_types
from tasks.report import report
from tasks.track import track

logging.getLogger("samq").setLevel(logging.INFO)  # in a worker nobody else does


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


@flow(
    name="requantize",
    flow_run_name=run_name,
    task_runner=task_runner(),
)
def requantize(parameters: RequantizeParameters) -> FinishedSweep:
    """Measure a sweep, compare it with what is in production, report and track it, and register the best candidate."""
    return finish_sweep(parameters)


def finish_sweep(parameters: RequantizeParameters, tags: Mapping[str, str] | None = None) -> FinishedSweep:
    """What the flow does; the run in MLflow has the tags, too."""
    at = workspace_of(parameters)
    sweep = measure_sweep(at, parameters)
    tracking = tracking_settings(parameters, sweep.made_from.source.name, tags)
    sweep = compare_with_references(sweep, parameters.benchmarks.margin, tracking)
    markdown = report(sweep, parameters.cost)
    drift = report_drift(sweep, parameters.benchmarks.margin, tracking)
    tracked = track(tracking, sweep, markdown, drift)
    if parameters.candidates.keep != "all":
        drop_files(at, sweep, parameters.candidates.keep, tracking.tracking_uri)
    return FinishedSweep(sweep, markdown, tracked)
