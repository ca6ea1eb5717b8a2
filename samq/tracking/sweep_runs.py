"""A sweep in MLflow: a parent run for the sweep, a child run for each candidate, the best one registered.

Everything goes through a client of one tracking URI. So MLflow's global state (its URI, its active run) is not touched, and
sweeps may be tracked from several threads. A run is FINISHED once all of it is logged, and FAILED if something went wrong.
"""

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)

from samq import __version__
from samq.errors import SamqError
from samq.files import EVALUATION_NAME, ITEMS_NAME, PLAN_NAME
from samq.home import ARTIFACTS, home, place_of, relative_place, sqlite_folder, without_password
from samq.records import CalibrationSet, TextSet
from samq.relocation import ARTIFACTS_TAG
from samq.report.description import describe_plan
from samq.report.figures import pareto_figure, prediction_figure
from samq.report.heatmaps import plans_heatmap, sensitivity_heatmap, types_heatmap
from samq.report.prediction import predicted_and_measured
from samq.report.table import results_table
from samq.sweep.benchmarking import items_of
from samq.sweep.selection import Failure, Result
from samq.sweep.sweep import MadeFrom, Sweep
from samq.tracking import mlflow_view
from samq.tracking.mlflow_values import benchmark_metrics, common_params, flatten, metrics_of, params_of
from samq.tracking.registry import HELDOUT, connect, name_mmproj, register, user
from samq.tracking.tracked import FAILURES, FLOW_RUN, REGISTERED, TrackedSweep, TrackingSettings, types_figure

logger = logging.getLogger(__name__)

_TAG_CHARACTERS = 8000  # MLflow's limit of a tag's value
_DIGEST_CHARACTERS = 12  # of a dataset's digest: what MLflow's table has room for; a parameter has it all
_EXPERIMENT_KIND = {"mlflow.experimentKind": "custom_model_development"}  # the page for models, not for prompts
_EXPERIMENT_NOTE = """\
A parent run is a sweep; its children are the candidates: full precision, stock mixtures, and plans by sensitivity.

- **To choose,** open *Views*, *Latest sweep*: the candidates with their metrics, and charts of the metrics by size.
- A parent run's description has the whole report, its artifacts the figures.
- `comparison/...` is against the stock mixture in the tag `samq.rival`: the largest that is no larger or of its size.
- `plan/threshold` of full precision is 0 (it keeps every tensor), of a stock mixture 1 (it keeps none).
- `plan/budget_bytes` of a candidate without a budget is what its tensors take.
- `..._stderr` is the standard error of the metric before it; units are in the names.
"""


def track_sweep(settings: TrackingSettings, sweep: Sweep, report: str, drift: str | None = None) -> TrackedSweep:
    """Log a sweep, register its best candidate if the settings name a model, and say where all of it is.

    `report` is the sweep in Markdown, `drift` how it differs from the one before. A registration that fails stands in the tag
    `samq.registered`, and the sweep counts all the same. Raises SamqError if MLflow cannot be used or refuses anything else;
    the parent run then is FAILED.
    """
    client = connect(settings.tracking_uri)
    try:
        experiment_id = _experiment(client, settings)
        with _run(client, experiment_id, settings.run_name, _parent_tags(settings, sweep, report)) as parent:
            figures = _figures(sweep)
            _log_parent(client, parent, settings, sweep, report, figures)
            if drift:
                client.log_text(parent, drift, "drift.md")
            children = _log_children(client, experiment_id, parent, settings, sweep)
            version, not_registered = _register(client, settings.registered_model, children, sweep)
            if version or not_registered:
                outcome = f"{settings.registered_model} version {version}" if version else f"failed: {not_registered}"
                client.set_tag(parent, REGISTERED, _cut(outcome))
            values = [_values(result, settings, sweep) for result in sweep.results]
            client.set_experiment_tag(experiment_id, mlflow_view.TAG, mlflow_view.view_of(parent, _now_ms(), values))
    except (MlflowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise SamqError(
            f"cannot log the sweep to MLflow at {without_password(settings.tracking_uri)}: {reason}; track it again"
        ) from error
    return TrackedSweep(
        tracking_uri=settings.tracking_uri,
        experiment_id=experiment_id,
        parent_run_id=parent,
        child_run_ids={result.name: children[result.name] for result in sweep.by_size},
        registered_model=settings.registered_model if version else None,
        model_version=version,
        not_registered=not_registered,
        flow_run_id=settings.tags.get(FLOW_RUN) or None,
        types_figure=types_figure(figures),
    )


def _parent_tags(settings: TrackingSettings, sweep: Sweep, report: str) -> dict[str, str]:
    tags = {
        **settings.tags,
        "samq.candidates": str(len(sweep.results)),
        "samq.best": sweep.best.name if sweep.best else "",
        MLFLOW_RUN_NOTE: _cut(_body(report)),
    }
    if sweep.failures:
        failures = (f"{failure.name} in {failure.stage}: {failure.reason}" for failure in sweep.failures)
        tags[FAILURES] = _cut("; ".join(failures))
    return tags


def _log_parent(
    client: MlflowClient,
    run_id: str,
    settings: TrackingSettings,
    sweep: Sweep,
    report: str,
    figures: Mapping[str, Figure],
) -> None:
    """Parameters, report, table, figures, and the records of comparisons and checks."""
    parameters = {**flatten(settings.parameters), **common_params(sweep.made_from)}
    client.log_batch(run_id, _best_metrics(sweep.best), _params(parameters))
    _log_inputs(client, run_id, _datasets(sweep.made_from))
    client.log_text(run_id, report, "report.md")
    client.log_table(run_id, results_table(sweep), "candidates.json")
    for name, figure in figures.items():
        client.log_figure(run_id, figure, f"figures/{name}")
    client.log_dict(run_id, sweep.sensitivity.content(), "sensitivity-map.json")
    if sweep.benchmarks:
        rows = [comparison.model_dump(mode="json") for comparison in sweep.benchmarks]
        client.log_dict(run_id, {"comparisons": rows}, "benchmark-comparisons.json")
    if sweep.checks:
        checks = {check.plan: check.model_dump(mode="json") for check in sweep.checks}
        client.log_dict(run_id, checks, "prediction-checks.json")


def _log_children(
    client: MlflowClient, experiment_id: str, parent: str, settings: TrackingSettings, sweep: Sweep
) -> dict[str, str]:
    """A child run for each candidate; name -> run id of those that were measured."""
    for failure in sweep.lost:
        _log_failure(client, experiment_id, parent, failure, sweep.made_from)
    children = {}
    for result in reversed(sweep.by_size):  # MLflow lists the newest first
        tags = {MLFLOW_PARENT_RUN_ID: parent, "samq.verdict": _verdict(result, sweep)}
        if rival := sweep.rival(result):
            tags["samq.rival"] = rival.name
        with _run(client, experiment_id, result.name, tags) as child:
            _log_result(client, child, result, _values(result, settings, sweep), sweep.made_from)
        children[result.name] = child
    return children


def _values(result: Result, settings: TrackingSettings, sweep: Sweep) -> dict[str, float]:
    """All metrics of a candidate."""
    return metrics_of(result, sweep) | benchmark_metrics(result, sweep, settings.cost)


def _register(
    client: MlflowClient, name: str | None, children: Mapping[str, str], sweep: Sweep
) -> tuple[str | None, str | None]:
    """The version that the best candidate is now, or why it is none; neither if there is nothing to register."""
    best, mmproj = sweep.best, sweep.made_from.mmproj
    if name is None or best is None:
        return None, None
    try:
        version = register(
            client,
            name,
            children[best.name],
            model=best.model,
            gguf=best.gguf,
            plan=best.plan,
            evaluation=best.evaluation,
        )
        if mmproj:
            name_mmproj(client, name, version, mmproj)
    except SamqError as error:
        logger.warning("%s is not registered: %s", best.name, error)
        return None, str(error)
    return version, None


def _figures(sweep: Sweep) -> dict[str, Figure]:
    """What the parent run shows, by name; figures that the sweep has no data for are left out."""
    figures = {"pareto.png": pareto_figure(sweep), "sensitivity.png": sensitivity_heatmap(sweep.sensitivity)}
    if predicted_and_measured(sweep.results):
        figures["prediction.png"] = prediction_figure(sweep)
    if sweep.best:
        figures["types.png"] = types_heatmap(sweep.best.plan)
    if budgets := [result.plan for result in sweep.by_size if result.plan.policy == "budget"]:
        figures["budgets.png"] = plans_heatmap(budgets)
    return figures


def _best_metrics(best: Result | None) -> list[Metric]:
    """What the parent run shows, for a look over many nights: the best candidate's fidelity and size."""
    if best is None or best.kld is None:
        return []
    values = {"best/mean_kld_nats": best.kld.value, "best/file_bytes": float(best.bytes)}
    return [Metric(name, value, _now_ms(), 0) for name, value in values.items()]


def _verdict(result: Result, sweep: Sweep) -> str:
    if result.plan.policy == "full":
        return "baseline"
    if result is sweep.best:
        return "★ best"
    return "◆ Pareto front" if result.name in sweep.front else "dominated"


def _experiment(client: MlflowClient, settings: TrackingSettings) -> str:
    """Id of the experiment, made or brought back from the deleted ones if need be."""
    experiment = client.get_experiment_by_name(settings.experiment)
    if experiment is None:
        folder = sqlite_folder(settings.tracking_uri)
        # A server knows where its clients' artifacts go; a database would take the working directory.
        beside = None if urlsplit(settings.tracking_uri).scheme in ("http", "https") else folder or home()
        location = settings.artifact_location or (str(beside / ARTIFACTS) if beside else None)
        tags = {**_EXPERIMENT_KIND, MLFLOW_RUN_NOTE: _EXPERIMENT_NOTE}
        if folder and location and not urlsplit(location).scheme:
            place = relative_place(Path(location), folder)
            tags |= {ARTIFACTS_TAG: place} if place else {}
        try:
            created = client.create_experiment(settings.experiment, location)
            for key, value in tags.items():
                client.set_experiment_tag(created, key, value)
            return str(created)
        except MlflowException as error:
            experiment = client.get_experiment_by_name(settings.experiment)  # another process was faster
            if experiment is None:
                raise error
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


@contextmanager
def _run(client: MlflowClient, experiment_id: str, name: str, tags: Mapping[str, str]) -> Iterator[str]:
    """A run that is FINISHED when the block ends well, and FAILED otherwise; yields its id."""
    run_id = _create_run(client, experiment_id, name, tags)
    try:
        yield run_id
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")


def _create_run(client: MlflowClient, experiment_id: str, name: str, tags: Mapping[str, str]) -> str:
    who = {MLFLOW_USER: user(), MLFLOW_SOURCE_NAME: f"samq {__version__}", MLFLOW_SOURCE_TYPE: "LOCAL"}
    return str(client.create_run(experiment_id, tags={**who, **tags}, run_name=name).info.run_id)


def _log_result(
    client: MlflowClient,
    run_id: str,
    result: Result,
    values: Mapping[str, float],
    made_from: MadeFrom,
) -> None:
    tags = {
        MLFLOW_RUN_NOTE: describe_plan(result.plan),
        "samq.gguf": place_of(result.gguf, client.tracking_uri),
        # Not parameters: the compare page would draw an axis for whatever differs between runs.
        "samq.gguf_sha256": result.model.sha256,
        "samq.plan_digest": result.model.plan_digest,
    }
    if result.evaluation.missing:
        tags["samq.missing"] = _cut(json.dumps(result.evaluation.missing))
    # The time is the run's own, so that the registry can log the same metrics for the model without doubling them.
    started = client.get_run(run_id).info.start_time
    client.log_batch(
        run_id,
        metrics=[Metric(name, value, started, 0) for name, value in values.items()],
        params=_params({**params_of(result.plan), **common_params(made_from)}),
        tags=[RunTag(key, value) for key, value in tags.items()],
    )
    _log_inputs(client, run_id, _datasets(made_from))
    client.log_dict(run_id, result.plan.content(), PLAN_NAME)
    client.log_figure(run_id, types_heatmap(result.plan), "types.png")
    for path in sorted(result.folder.iterdir()):
        if path.suffix == ".parquet":
            client.log_artifact(run_id, str(path), "evaluation")
    with tempfile.TemporaryDirectory() as folder:
        joined = result.evaluation.save(Path(folder) / EVALUATION_NAME)  # with the benchmarks
        client.log_artifact(run_id, str(joined), "evaluation")
        if result.benchmark_folders:
            items_of(result).to_parquet(Path(folder) / ITEMS_NAME, index=False)
            client.log_artifact(run_id, str(Path(folder) / ITEMS_NAME), "evaluation")


def _log_failure(client: MlflowClient, experiment_id: str, parent: str, failure: Failure, made_from: MadeFrom) -> None:
    tags = {
        MLFLOW_PARENT_RUN_ID: parent,
        MLFLOW_RUN_NOTE: _cut(f"Failed in {failure.stage}: {failure.reason}"),
        "samq.verdict": f"failed in {failure.stage}",
        "samq.failure": _cut(failure.reason),
    }
    run_id = _create_run(client, experiment_id, failure.name, tags)
    client.log_batch(run_id, params=_params(common_params(made_from)))
    client.set_terminated(run_id, "FAILED")


def _datasets(made_from: MadeFrom) -> list[DatasetInput]:
    return [_dataset(made_from.calibration, "calibration"), _dataset(made_from.heldout, HELDOUT)]


def _dataset(text: CalibrationSet | TextSet, context: str) -> DatasetInput:
    """A run's input: which text, by name and digest."""
    if isinstance(text, CalibrationSet):
        digest, profile = text.tokens_digest, {"samples": text.samples, "tokens": text.tokens}
    else:
        digest, profile = text.digest(), {"samples": len(text.texts)}
    dataset = Dataset(
        name=text.dataset,
        digest=digest[:_DIGEST_CHARACTERS],
        source_type="samq",
        source=json.dumps({"dataset": text.dataset}),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)])


def _log_inputs(client: MlflowClient, run_id: str, datasets: list[DatasetInput]) -> None:
    try:
        client.log_inputs(run_id, datasets)
    except MlflowException:  # another sweep brought the same dataset first, in the same moment; now it is there
        client.log_inputs(run_id, datasets)


def _params(values: Mapping[str, str]) -> list[Param]:
    return [Param(key, value) for key, value in values.items()]


def _body(report: str) -> str:
    """The report without its title, which the run's page would set in huge letters."""
    title, _, body = report.partition("\n")
    return body.lstrip() if title.startswith("# ") else report


def _cut(text: str) -> str:
    """Text cut to what a tag holds."""
    return text if len(text) <= _TAG_CHARACTERS else text[: _TAG_CHARACTERS - 1] + "…"


def _now_ms() -> int:
    return int(time.time() * 1000)
