"""MLflow: one parent run a sweep, one child run a candidate, the same keys on each."""

import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from samq import __version__
from samq.errors import SamqError
from samq.figures import pareto_figure, sensitivity_heatmap, types_heatmap
from samq.records import CalibrationSet, ModelSource, SensitivityMap, TextSet, Toolchain
from samq.report import kept_tensors, results_table
from samq.selection import Failure, Result
from samq.serving.registry import RegisteredGguf, register


@dataclass(frozen=True)
class TrackedSweep:
    """Where a sweep can be looked at."""

    tracking_uri: str
    experiment_id: str
    parent_run_id: str
    child_run_ids: dict[str, str]
    registered: RegisteredGguf | None


@dataclass(frozen=True)
class SweepFacts:
    """What all candidates of a sweep share."""

    name: str
    source: ModelSource
    calibration: CalibrationSet
    heldout: TextSet
    toolchain: Toolchain
    sensitivity: SensitivityMap


def metric_key(name: str) -> str:
    """A name that MLflow allows: letters, digits and `_ - . / space`; lm-eval's `acc,none` becomes `acc`."""
    return re.sub(r"[^\w\-./ ]", "_", name.removesuffix(",none").replace("%", "percent"))


def track_sweep(
    tracking_uri: str,
    experiment: str,
    facts: SweepFacts,
    results: Sequence[Result],
    failures: Sequence[Failure],
    best: Result | None,
    markdown: str,
    registered_model: str | None = None,
) -> TrackedSweep:
    """Log a sweep and, if asked to, register its best candidate as `candidate`.

    The parent run is FINISHED only when all is logged; on an error it is FAILED.
    """
    client, experiment_id = _open(tracking_uri, experiment)
    parent = client.create_run(experiment_id, run_name=facts.name, tags={"samq.kind": "sweep"}).info.run_id
    try:
        shared = _shared_parameters(facts)
        _log(client, parent, {}, {**shared, "candidates": str(len(results)), "failures": str(len(failures))})
        inputs = _datasets(facts)
        client.log_inputs(parent, inputs)
        children = {}
        for result in results:
            children[result.name] = _track_candidate(client, experiment_id, parent, result, shared, inputs, best)
        for failure in failures:
            tags = {"mlflow.parentRunId": parent, "samq.kind": "candidate", "samq.failed_in": failure.stage}
            run = client.create_run(experiment_id, run_name=failure.name, tags=tags).info.run_id
            client.set_tag(run, "mlflow.note.content", f"Failed in {failure.stage}: {failure.reason}"[:5000])
            client.set_terminated(run, "FAILED")
        _log_sweep(client, parent, facts, results, failures, best, markdown)
        registered = None
        if registered_model and best:
            registered = register(tracking_uri, registered_model, children[best.name], best)
            client.set_tag(parent, "samq.registered", f"{registered.name} version {registered.version}")
    except BaseException:
        client.set_terminated(parent, "FAILED")
        raise
    client.set_terminated(parent, "FINISHED")
    return TrackedSweep(tracking_uri, experiment_id, parent, children, registered)


def _open(tracking_uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """A client, its database made if there is none, and the experiment's id."""
    if tracking_uri.startswith("sqlite:///"):
        Path(tracking_uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(tracking_uri)
    client = MlflowClient(tracking_uri=tracking_uri)
    try:
        found = client.get_experiment_by_name(experiment)
        if found is None:
            location = None
            if tracking_uri.startswith("sqlite:///"):
                location = (Path(tracking_uri.removeprefix("sqlite:///")).parent / "mlartifacts").absolute().as_uri()
            experiment_id = client.create_experiment(experiment, artifact_location=location)
            note = "Each parent run is one sweep, each child run one GGUF. Compare the children of a sweep."
            client.set_experiment_tag(experiment_id, "mlflow.note.content", note)
            return client, experiment_id
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise SamqError(
            f"MLflow at {tracking_uri} cannot be used ({reason}); check the address and the server"
        ) from error
    if found.lifecycle_stage == "deleted":
        raise SamqError(f"the MLflow experiment {experiment} is deleted; restore it, or use another name")
    return client, found.experiment_id


def _shared_parameters(facts: SweepFacts) -> dict[str, str]:
    source, calibration = facts.source, facts.calibration
    return {
        "model": source.name,
        "revision": source.revision or "",
        "weights_sha256": source.weights_digest,
        "calibration": calibration.dataset,
        "calibration_samples": str(calibration.samples),
        "calibration_tokens": str(calibration.tokens),
        "calibration_digest": calibration.tokens_digest,
        "heldout": facts.heldout.dataset,
        "heldout_digest": facts.heldout.digest(),
        "llama_cpp": f"{facts.toolchain.version} {facts.toolchain.build}",
        "samq": __version__,
    }


def _track_candidate(
    client: MlflowClient,
    experiment_id: str,
    parent: str,
    result: Result,
    shared: Mapping[str, str],
    inputs: list[DatasetInput],
    best: Result | None,
) -> str:
    tags = {
        "mlflow.parentRunId": parent,
        "samq.kind": "candidate",
        "samq.best": str(bool(best and best.name == result.name)),
    }
    run = client.create_run(experiment_id, run_name=result.name, tags=tags).info.run_id
    plan = result.plan
    settings = {key: "" if value is None else str(value) for key, value in plan.parameters.items()}
    policy = {
        key: settings.get(key, "") for key in ("threshold", "quantile", "keep", "base", "grouping", "output_guard")
    }
    identity = {"policy": plan.policy, "gguf_sha256": result.model.sha256, "plan_digest": result.model.plan_digest}
    kept = kept_tensors(plan)
    metrics = {
        "plan/bits_per_weight": result.model.bits_per_weight,
        "plan/tensor_bytes": float(plan.tensor_bytes),
        # Parallel coordinates need the same numbers on every run: at threshold 1 nothing is kept, at 0 everything is.
        "plan/threshold": float(plan.parameters.get("threshold") or {"full": 0.0}.get(plan.policy, 1.0)),
        "plan/kept_tensors": float(len(plan.types) if plan.policy == "full" else kept or 0),
    }
    for name, metric in result.evaluation.metrics.items():
        metrics[name] = metric.value
        if metric.stderr is not None:
            metrics[f"{name}_stderr"] = metric.stderr
    _log(client, run, metrics, {**shared, **policy, **identity})
    client.log_inputs(run, inputs)
    client.log_text(run, plan.model_dump_json(indent=1), "plan.json")
    for path in sorted(result.folder.iterdir()):
        if path.suffix in (".json", ".parquet") and path.name != "artifact.json":
            client.log_artifact(run, str(path), "evaluation")
    client.log_figure(run, types_heatmap(plan), "figures/types.png")
    client.set_terminated(run, "FINISHED")
    return run


def _log_sweep(
    client: MlflowClient,
    parent: str,
    facts: SweepFacts,
    results: Sequence[Result],
    failures: Sequence[Failure],
    best: Result | None,
    markdown: str,
) -> None:
    client.log_text(parent, markdown, "report.md")
    client.set_tag(parent, "mlflow.note.content", markdown[:5000])
    client.set_tag(parent, "samq.best", best.name if best else "none")
    client.log_figure(parent, pareto_figure(results, best.name if best else None), "figures/pareto.png")
    client.log_figure(parent, sensitivity_heatmap(facts.sensitivity), "figures/sensitivity.png")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        results_table(results, failures).to_csv(folder / "candidates.csv", index=False)
        facts.sensitivity.save(folder / "sensitivity-map.json")
        facts.calibration.save(folder / "calibration-set.json")
        client.log_artifacts(parent, str(folder))


def _log(client: MlflowClient, run: str, metrics: Mapping[str, float], parameters: Mapping[str, str]) -> None:
    now = int(time.time() * 1000)
    client.log_batch(
        run,
        metrics=[Metric(metric_key(name), value, now, 0) for name, value in metrics.items()],
        params=[Param(name, value) for name, value in parameters.items()],
        tags=[RunTag("samq.version", __version__)],
    )


def _datasets(facts: SweepFacts) -> list[DatasetInput]:
    """The texts, as MLflow's dataset inputs with their use as context."""

    def entry(context: str, name: str, digest: str, profile: str) -> DatasetInput:
        data = Dataset(name=name, digest=digest[:36], source_type="code", source="{}", profile=profile)
        return DatasetInput(dataset=data, tags=[InputTag("mlflow.data.context", context)])

    calibration = facts.calibration
    profile = f'{{"samples": {calibration.samples}, "tokens": {calibration.tokens}}}'
    texts = f'{{"texts": {len(facts.heldout.texts)}}}'
    return [
        entry("calibration", calibration.dataset, calibration.tokens_digest, profile),
        entry("heldout", facts.heldout.dataset, facts.heldout.digest(), texts),
    ]
