"""A sweep in MLflow: a parent run for the sweep, a child run for each candidate, the best one registered.

Everything goes through a client of one tracking URI, so MLflow's global state (its URI, its active run) is not touched and
sweeps may be tracked from several threads. A run is FINISHED once all of it is logged, and FAILED if something went wrong.
"""

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

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
from pydantic import BaseModel, ConfigDict, Field

from samq import __version__
from samq.tracking import mlflow_view
from samq.sweep.benchmarking import items_of
from samq.sweep.cost import CostSettings
from samq.report.description import describe_plan
from samq.errors import SamqError
from samq.evaluation.settings import EVALUATION_NAME
from samq.report.figures import pareto_figure, prediction_figure
from samq.report.heatmaps import plans_heatmap, sensitivity_heatmap, types_heatmap
from samq.tracking.mlflow_values import benchmark_metrics, common_params, flatten, metrics_of, params_of
from samq.report.prediction import predicted_and_measured
from samq.records import CalibrationSet, ModelSource, PredictionCheck, SensitivityMap, TextSet, Toolchain
from samq.report.markdown_report import results_table
from samq.sweep.selection import Comparison, Failure, Result, by_size, pareto, rival_of
from samq.tracking.registry import CANDIDATE_ALIAS, HELDOUT, connect, register, sqlite_folder, user
from samq.sweep.significance import ITEMS_NAME, PairedComparison

logger = logging.getLogger(__name__)

_TAG_CHARACTERS = 8000  # MLflow's limit of a tag's value
_DIGEST_CHARACTERS = 12  # of a dataset's digest: what MLflow's table has room for; a parameter has it all
_EXPERIMENT_KIND = {"mlflow.experimentKind": "custom_model_development"}  # the page for models, not for prompts
_EXPERIMENT_NOTE = """\
A parent run is a sweep; its children are the candidates: full precision, stock mixtures, and plans by sensitivity.

- **To choose,** open *Views*, *Latest sweep*: the candidates with their figures, and as charts what bytes buy.
- A parent run's description has the whole report, its artifacts the figures.
- `comparison/...` is against the stock mixture in the tag `samq.rival`: the largest that is no larger or of its size.
- `plan/threshold` of full precision is 0 (it keeps every tensor), of a stock mixture 1 (it keeps none).
- `plan/budget_bytes` of a candidate without a budget is what its tensors take.
- `..._stderr` is the standard error of the metric before it; units are in the names.
"""


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


@dataclass(frozen=True)
class TrackedSweep:
    """Where a sweep is to be found in MLflow."""

    tracking_uri: str
    experiment_id: str
    parent_run_id: str
    child_run_ids: dict[str, str]  # of the candidates that were measured
    registered_model: str | None = None
    model_version: str | None = None
    not_registered: str | None = None  # why the best is not, though it was asked for

    def urls(self, address: str) -> dict[str, str]:
        """Pages of this sweep on an MLflow server.

        The sweep's run, the table and the charts of its candidates, their comparison, and the registered version.
        """
        experiment = f"{address}/#/experiments/{self.experiment_id}"
        models = "workflowType=machine_learning"  # else MLflow shows its pages for prompts and agents
        view = f"{experiment}/runs?{models}&viewStateShareKey={mlflow_view.KEY}"
        ids = quote(json.dumps(list(self.child_run_ids.values())))
        urls = {
            "sweep": f"{experiment}/runs/{self.parent_run_id}?{models}",
            "candidates": view,
            "charts": f"{view}&compareRunsMode=CHART",
            "compare": f"{address}/#/compare-runs?runs={ids}&experiments=%5B%22{self.experiment_id}%22%5D&{models}",
        }
        if self.registered_model and self.model_version:
            urls["model"] = f"{address}/#/models/{quote(self.registered_model)}/versions/{self.model_version}?{models}"
        return urls

    def summary(self) -> list[str]:
        """Lines that tell a person at a terminal where to look."""
        served = self.tracking_uri.startswith("http")
        urls = self.urls(self.tracking_uri.rstrip("/") if served else "http://127.0.0.1:5000")
        lines = [f"MLflow: {urls['sweep']}" + ("" if served else "   (after `samq ui`)")]
        if "model" in urls:
            lines.append(f"registered: {self.registered_model} version {self.model_version}, alias {CANDIDATE_ALIAS}")
        if self.not_registered:
            lines.append(f"not registered: {self.not_registered}; run the sweep again, which measures nothing anew")
        return lines


def track_sweep(
    settings: TrackingSettings,
    *,
    source: ModelSource,
    calibration: CalibrationSet,
    heldout: TextSet,
    toolchain: Toolchain,
    sensitivity: SensitivityMap,
    results: Sequence[Result],
    failures: Sequence[Failure],
    best: Result | None,
    report: str,
    parameters: Mapping[str, Any],
    tags: Mapping[str, str],
    comparisons: Sequence[Comparison] = (),
    checks: Sequence[PredictionCheck] = (),
    benchmarks: Sequence[PairedComparison] = (),
    cost: CostSettings | None = None,
) -> TrackedSweep:
    """Log a sweep, register its best candidate if the settings name a model, and say where all of it is.

    `report` is the sweep's markdown, `parameters` what the sweep was asked to do (may be nested), `tags` more for the
    parent run, `comparisons` those of `samq.sweep.comparison`, `checks` those of the predictions. A registration that fails is
    said in the tag `samq.registered` and costs no more. Raises SamqError if MLflow cannot be used or refuses something
    else; the parent run then is FAILED.
    """
    client = connect(settings.tracking_uri)
    common = common_params(source, calibration, heldout, toolchain)
    datasets = [_dataset(calibration, "calibration"), _dataset(heldout, HELDOUT)]
    summary = {"samq.candidates": str(len(results)), "samq.best": best.name if best else ""}
    if failures:
        summary["samq.failures"] = _cut("; ".join(f"{one.name} in {one.stage}: {one.reason}" for one in failures))
    children: dict[str, str] = {}
    lost = [failure for failure in failures if failure.of_candidate]
    version = not_registered = None
    try:
        experiment_id = _experiment(client, settings)
        parent_tags = {**tags, **summary, MLFLOW_RUN_NOTE: _cut(_body(report))}
        with _run(client, experiment_id, settings.run_name, parent_tags) as parent:
            client.log_batch(parent, _best_metrics(best), _params({**flatten(parameters), **common}))
            _log_inputs(client, parent, datasets)
            client.log_text(parent, report, "report.md")
            client.log_table(parent, results_table(results, failures), "candidates.json")
            for name, figure in _figures(sensitivity, results, best, comparisons).items():
                client.log_figure(parent, figure, f"figures/{name}.png")
            client.log_dict(parent, sensitivity.content(), "sensitivity-map.json")
            if benchmarks:
                rows = [one.model_dump(mode="json") for one in benchmarks]
                client.log_dict(parent, {"comparisons": rows}, "benchmark-comparisons.json")
            if checks:
                client.log_dict(parent, {c.plan: c.model_dump(mode="json") for c in checks}, "prediction-checks.json")
            for failure in lost:
                _log_failure(client, experiment_id, parent, failure, common)
            front = pareto(results)
            values = {
                result.name: metrics_of(result, results, comparisons) | benchmark_metrics(result, benchmarks, cost)
                for result in results
            }
            for result in reversed(by_size(results)):  # MLflow lists the newest first
                child_tags = {MLFLOW_PARENT_RUN_ID: parent, "samq.verdict": _verdict(result, best, front)}
                if rival := rival_of(result, results):
                    child_tags["samq.rival"] = rival.name
                with _run(client, experiment_id, result.name, child_tags) as child:
                    _log_result(client, child, result, values[result.name], common, datasets)
                children[result.name] = child
            if best and settings.registered_model:
                version, not_registered = _register(client, settings.registered_model, children[best.name], best)
                registered = (
                    f"{settings.registered_model} version {version}" if version else f"failed: {not_registered}"
                )
                client.set_tag(parent, "samq.registered", _cut(registered))
            view = mlflow_view.view_of(parent, _now_ms(), values.values())
            client.set_experiment_tag(experiment_id, mlflow_view.TAG, view)
    except (MlflowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise SamqError(
            f"cannot log the sweep to MLflow at {settings.tracking_uri}: {reason}; track it again"
        ) from error
    return TrackedSweep(
        tracking_uri=settings.tracking_uri,
        experiment_id=experiment_id,
        parent_run_id=parent,
        child_run_ids={result.name: children[result.name] for result in by_size(results)},
        registered_model=settings.registered_model if version else None,
        model_version=version,
        not_registered=not_registered,
    )


def _register(client: MlflowClient, name: str, run_id: str, best: Result) -> tuple[str | None, str | None]:
    """The version that the best candidate is now, or why it is none: what was measured is worth the same without it."""
    try:
        version = register(
            client, name, run_id, model=best.model, gguf=best.gguf, plan=best.plan, evaluation=best.evaluation
        )
    except SamqError as error:
        logger.warning("%s is not registered: %s", best.name, error)
        return None, str(error)
    return version, None


def _figures(
    sensitivity: SensitivityMap, results: Sequence[Result], best: Result | None, comparisons: Sequence[Comparison]
) -> dict[str, Figure]:
    """What the parent run shows, by name; the figures that a sweep has nothing for are left out."""
    figures = {
        "pareto": pareto_figure(results, best.name if best else None, comparisons),
        "sensitivity": sensitivity_heatmap(sensitivity),
    }
    if predicted_and_measured(results):
        figures["prediction"] = prediction_figure(results)
    if best:
        figures["types"] = types_heatmap(best.plan)
    if budgets := [result.plan for result in by_size(results) if result.plan.policy == "budget"]:
        figures["budgets"] = plans_heatmap(budgets)
    return figures


def _best_metrics(best: Result | None) -> list[Metric]:
    """What the parent run shows, for a look over many nights: the best candidate's fidelity and size."""
    if best is None or best.kld is None:
        return []
    values = {"best/mean_kld_nats": best.kld.value, "best/file_bytes": float(best.bytes)}
    return [Metric(name, value, _now_ms(), 0) for name, value in values.items()]


def _verdict(result: Result, best: Result | None, front: Sequence[str]) -> str:
    if result.plan.policy == "full":
        return "baseline"
    if best and result.name == best.name:
        return "★ best"
    return "◆ Pareto front" if result.name in front else "dominated"


def _experiment(client: MlflowClient, settings: TrackingSettings) -> str:
    """Id of the experiment, made or brought back from the deleted ones if need be."""
    found = client.get_experiment_by_name(settings.experiment)
    if found is None:
        folder = sqlite_folder(settings.tracking_uri)
        location = settings.artifact_location or (str(folder / "mlartifacts") if folder else None)
        try:
            made = client.create_experiment(settings.experiment, location)
            for key, value in {**_EXPERIMENT_KIND, MLFLOW_RUN_NOTE: _EXPERIMENT_NOTE}.items():
                client.set_experiment_tag(made, key, value)
            return str(made)
        except MlflowException as error:
            found = client.get_experiment_by_name(settings.experiment)  # another process was faster
            if found is None:
                raise error
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


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
    common: Mapping[str, str],
    datasets: list[DatasetInput],
) -> None:
    tags = {
        MLFLOW_RUN_NOTE: describe_plan(result.plan),
        "samq.gguf": str(result.gguf),
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
        params=_params({**params_of(result.plan), **common}),
        tags=[RunTag(key, value) for key, value in tags.items()],
    )
    _log_inputs(client, run_id, datasets)
    client.log_dict(run_id, result.plan.content(), "plan.json")
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


def _log_failure(
    client: MlflowClient, experiment_id: str, parent: str, failure: Failure, common: Mapping[str, str]
) -> None:
    tags = {
        MLFLOW_PARENT_RUN_ID: parent,
        MLFLOW_RUN_NOTE: _cut(f"Failed in {failure.stage}: {failure.reason}"),
        "samq.verdict": f"failed in {failure.stage}",
        "samq.failure": _cut(failure.reason),
    }
    run_id = _create_run(client, experiment_id, failure.name, tags)
    client.log_batch(run_id, params=_params(common))
    client.set_terminated(run_id, "FAILED")


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
