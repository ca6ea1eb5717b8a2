"""MLflow's model registry: versions that refer to GGUFs where they lie, and the aliases that point at them."""

from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from samq.errors import SamqError
from samq.selection import Result

CANDIDATE = "candidate"


@dataclass(frozen=True)
class RegisteredGguf:
    """One version of a registered model."""

    name: str
    version: str
    gguf: Path
    sha256: str
    bytes: int


def register(tracking_uri: str, name: str, run_id: str, result: Result, alias: str = CANDIDATE) -> RegisteredGguf:
    """Register a candidate's GGUF under `name` and point `alias` at it; the file stays where it is.

    A GGUF that is a version of the model already (same SHA-256) only gets the alias: nights with nothing new make no
    twins.
    """
    mlflow.set_tracking_uri(tracking_uri)
    client = MlflowClient(tracking_uri=tracking_uri)
    tags = {
        "gguf_uri": result.gguf.as_uri(),
        "sha256": result.model.sha256,
        "size_bytes": str(result.model.file_bytes),
        "plan": result.model.plan_digest,
        "candidate": result.name,
    }
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(
            name, description="GGUFs made by SAMQ; the alias `candidate` is the last sweep's best."
        )
    twins = [
        version
        for version in client.search_model_versions(f"name = '{name}'")
        if version.tags.get("sha256") == result.model.sha256
    ]
    if twins:
        version = twins[0].version
        client.set_model_version_tag(name, version, "gguf_uri", tags["gguf_uri"])
    else:
        run = client.get_run(run_id)
        external = mlflow.create_external_model(
            name=name, source_run_id=run_id, experiment_id=run.info.experiment_id, tags=tags, params=run.data.params
        )
        version = client.create_model_version(
            name,
            source=f"models:/{external.model_id}",
            run_id=run_id,
            tags=tags,
            model_id=external.model_id,
            description=_describe(result),
        ).version
    client.set_registered_model_alias(name, alias, version)
    return resolve(tracking_uri, name, alias)


def resolve(tracking_uri: str, name: str, alias: str) -> RegisteredGguf:
    """The version that an alias points at; raises SamqError if there is no such model or alias."""
    client = MlflowClient(tracking_uri=tracking_uri)
    try:
        version = client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        raise SamqError(
            f"no model {name}@{alias} is registered at {tracking_uri}; run a sweep that registers it"
        ) from error
    path = Path(version.tags["gguf_uri"].removeprefix("file://"))
    return RegisteredGguf(name, str(version.version), path, version.tags["sha256"], int(version.tags["size_bytes"]))


def _describe(result: Result) -> str:
    metrics = result.evaluation.metrics
    kld, ratio = metrics.get("fidelity/mean_kld_nats"), metrics.get("fidelity/perplexity_ratio")
    parts = [f"{result.name}: {result.bytes / 1e6:.1f} MB, {result.model.bits_per_weight:.2f} bits per weight"]
    parts += [f"mean KLD {kld.value:.5f} nats"] if kld else []
    parts += [f"perplexity {ratio.value:.4f} times the baseline's"] if ratio else []
    return ", ".join(parts)
