"""MLflow's model registry: GGUFs as versions of a registered model, found by alias.

A version points at the GGUF and holds no copy of it. Its tags give the place (`gguf_uri`, see `samq.home`), the content
(`sha256`) and the size (`size_bytes`); its metrics are those of the candidate's run. Nothing here sets MLflow's global state.
"""

import getpass
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric, Run
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.tracking._model_registry.client import ModelRegistryClient
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL, MLFLOW_MODEL_VERSIONS, MLFLOW_RUN_NOTE

from samq.errors import NotRegisteredError, SamqError, UnreachableError
from samq.home import path_of, place_of, place_uri, sqlite_file, without_password
from samq.relocation import relocate
from samq.tracking.patience import check_database, check_server, is_of_database, patient, quiet_mlflow, unusable

if TYPE_CHECKING:
    from samq.records import Evaluation, Plan, QuantizedModel

CANDIDATE_ALIAS = "candidate"
PRODUCTION_ALIAS = "production"
PREVIOUS_ALIAS = "previous"
_SERVERS = ("postgresql", "mysql", "mssql")  # kinds of databases that MLflow reaches by itself
_SHOWN = 80  # characters
_OPEN_S = 120.0  # for others that open the same SQLite file: the first one creates its tables
VERSION = r"^[1-9][0-9]{0,8}$"  # what a version looks like
HELDOUT = "heldout"  # context of the dataset that fidelity is measured on, among a run's inputs


def _is_place(text: str) -> bool:
    """Whether Python can look for a file there."""
    try:
        return bool(urlsplit(text).path) and "\0" not in unquote(text)
    except ValueError:  # such as file://[
        return False


# Tag -> what its value must be, as a check and in words.
_FORMS: dict[str, tuple[Callable[[str], bool], str]] = {
    "gguf_uri": (_is_place, "the place of a file"),
    "sha256": (lambda text: re.fullmatch(r"[0-9a-f]{64}", text) is not None, "a SHA-256"),
    "size_bytes": (lambda text: re.fullmatch(r"[0-9]{1,15}", text) is not None, "a number of bytes"),
    "plan_digest": (lambda text: re.fullmatch(r"\S{1,200}", text) is not None, "a plan's digest"),
}


@dataclass(frozen=True)
class RegisteredGguf:
    """A version of a registered model."""

    name: str
    version: str
    uri: str  # absolute
    sha256: str
    size_bytes: int
    plan_digest: str
    run_id: str
    mmproj_uri: str = ""  # absolute; of the vision or audio part, if there is one
    mmproj_sha256: str = ""

    @property
    def path(self) -> Path:
        """The GGUF on this machine; raises SamqError if it is elsewhere."""
        return self._here(self.uri)

    @property
    def mmproj(self) -> Path | None:
        """The vision or audio part on this machine, if there is one; raises SamqError if it is elsewhere."""
        return self._here(self.mmproj_uri) if self.mmproj_uri else None

    def _here(self, uri: str) -> Path:
        path = path_of(uri)
        if path is None:
            raise SamqError(f"version {self.version} of {self.name} is at {uri}, not on this machine; copy it here")
        if not path.exists() and os.environ.get("SAMQ_STORE"):
            from samq.store import stored_file  # slow to import, and a rollback does not need it

            return stored_file(path)
        return path


def connect(tracking_uri: str) -> MlflowClient:
    """A client of one MLflow server or database; creates a SQLite file that does not exist.

    Several processes may connect to a new SQLite file at the same time. MLflow creates its tables without a lock, so this
    function takes one. If the SQLite file's folder was moved or copied, the paths in the file follow (`samq.relocation`).
    Raises UnreachableError if MLflow cannot be used there, as do the client's calls if another process
    keeps the SQLite file locked.
    """

    def open_client() -> MlflowClient:
        client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
        client.search_experiments(max_results=1)
        return client

    return _connect(tracking_uri, open_client)


def connect_registry(tracking_uri: str) -> MlflowClient:
    """As `connect`, a client of the registry alone, without runs: it starts in less than half the time."""

    def open_client() -> Any:
        untyped: Any = ModelRegistryClient
        client = untyped(tracking_uri, tracking_uri)
        client.search_registered_models(max_results=1)
        return client

    return _connect(tracking_uri, open_client)


def _connect(tracking_uri: str, open_client: Callable[[], Any]) -> MlflowClient:
    database = sqlite_file(tracking_uri)
    quiet_mlflow()
    try:
        if database:
            database.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(database.parent / ".mlflow.lock", timeout=_OPEN_S) if database else nullcontext():
            if database:
                check_database(database, tracking_uri)
            elif tracking_uri.startswith(_SERVERS):
                check_server(tracking_uri)
            client = open_client()
            if database:
                relocate(database)
        return patient(client)
    except Timeout as error:
        raise UnreachableError(
            f"another process has been opening MLflow at {tracking_uri} for {_OPEN_S:.0f} seconds; end it, then try again"
        ) from error
    except Exception as error:
        if isinstance(error, MlflowException | OSError) or is_of_database(error):
            raise unusable(tracking_uri, error) from error
        raise


def register(
    client: MlflowClient,
    name: str,
    run_id: str,
    *,
    model: "QuantizedModel",
    gguf: Path,
    plan: "Plan",
    evaluation: "Evaluation",
    alias: str = CANDIDATE_ALIAS,
) -> str:
    """Register the GGUF as a version of the model `name`, point the alias at it, and return the version.

    A GGUF (by SHA-256) that is already a version keeps that version, so a sweep with the same result registers nothing.
    `run_id` is the candidate's run. The version shows its metrics and parameters.
    """
    place = place_of(gguf, client.tracking_uri)
    try:
        _create_registered_model(client, name)
        version = _find(client, name, model.sha256)
        if version is None:
            version = _create_version(client, name, client.get_run(run_id), model, place, plan, evaluation)
        elif version.tags.get("gguf_uri") != place:  # the same bytes at another place
            client.set_model_version_tag(name, version.version, "gguf_uri", place)
        client.set_registered_model_alias(name, alias, version.version)
    except MlflowException as error:
        raise SamqError(f"cannot register {gguf} as {name}: {str(error).splitlines()[0]}") from error
    return str(version.version)


def name_mmproj(client: MlflowClient, name: str, version: str, mmproj: Path) -> None:
    """Tag a version with the place and content of its vision or audio part (`mmproj_uri`, `mmproj_sha256`).

    Raises SamqError if the file cannot be read, or if MLflow refuses.
    """
    from samq.gguf.file import file_sha256  # slow to import, and a rollback does not need it

    tags = {"mmproj_uri": place_of(mmproj, client.tracking_uri), "mmproj_sha256": file_sha256(mmproj)}
    with mlflow_errors(client, f"no version {version} of a model {name}"):
        for tag, value in tags.items():
            client.set_model_version_tag(name, version, tag, value)


def resolve(client: MlflowClient, name: str, alias: str = CANDIDATE_ALIAS) -> RegisteredGguf:
    """The version that an alias points at; raises SamqError if there is none, or if SAMQ did not register it."""
    with mlflow_errors(client, f"no model {name} with the alias {alias}"):
        version = client.get_model_version_by_alias(name, alias)
    return _registered_gguf(client, version, f"move the alias {alias} to one that it did")


def find_version(client: MlflowClient, name: str, version: str) -> RegisteredGguf:
    """A version by its number; raises SamqError if there is none, or if SAMQ did not register it."""
    check_version(name, version)
    with mlflow_errors(client, f"no version {version} of a model {name}"):
        return _registered_gguf(client, client.get_model_version(name, version), "name one that it did")


def check_version(name: str, version: str) -> None:
    """Raise SamqError if that cannot be a version of the model `name`."""
    if not re.fullmatch(VERSION, version):
        raise SamqError(
            f"{_quoted(version)} is not a version of {name}; give a number such as 7, see `samq status {name}`"
        )


def aliases(client: MlflowClient, name: str) -> dict[str, str]:
    """Alias -> version of a registered model; raises SamqError if the model does not exist."""
    with mlflow_errors(client, f"no model {name}"):
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}


@contextmanager
def mlflow_errors(client: MlflowClient, absent: str) -> Iterator[None]:
    """Turn MLflow's errors into one sentence: that it has `absent` (such as "no model x"), or why it cannot be used."""
    try:
        yield
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise NotRegisteredError(
                f"MLflow at {without_password(client.tracking_uri)} has {absent}; register one first"
            ) from error
        raise unusable(client.tracking_uri, error) from error


def _quoted(text: str) -> str:
    """A text that a person may have written, in quotes and short enough for a sentence."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")


def user() -> str:
    """User name to record in MLflow."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a user id that has no name
        return "unknown"


def _registered_gguf(client: MlflowClient, version: ModelVersion, advice: str) -> RegisteredGguf:
    """The version as its tags describe it; raises SamqError if SAMQ did not write them so: anybody can edit tags."""
    tags = version.tags
    where = f"version {version.version} of {version.name}"
    missing = [tag for tag in _FORMS if tag not in tags]
    if missing:
        raise SamqError(f"{where} has no tag {missing[0]}, so SAMQ did not register it; {advice}")
    for tag, (is_right, meaning) in _FORMS.items():
        if not is_right(tags[tag]):
            raise SamqError(
                f"the tag {tag} of {where} is {_quoted(tags[tag])}, not {meaning}; set it right in MLflow, or run the sweep again"
            )
    return RegisteredGguf(
        name=version.name,
        version=str(version.version),
        uri=place_uri(tags["gguf_uri"], client.tracking_uri),
        sha256=tags["sha256"],
        size_bytes=int(tags["size_bytes"]),
        plan_digest=tags["plan_digest"],
        run_id=version.run_id or "",
        mmproj_uri=place_uri(tags["mmproj_uri"], client.tracking_uri) if "mmproj_uri" in tags else "",
        mmproj_sha256=tags.get("mmproj_sha256", ""),
    )


def model_names(client: MlflowClient) -> list[str]:
    """Names of the registered models, sorted."""
    with mlflow_errors(client, "no registered models"):
        return sorted(model.name for model in registered_models(client))


def notable_versions(client: MlflowClient, name: str, count: int) -> list[ModelVersion]:
    """The `count` newest versions of a registered model, and those that an alias points at; newest first."""
    aliased = aliases(client, name).values()
    with mlflow_errors(client, f"no model {name}"):
        newest = client.search_model_versions(f"name = '{name}'", max_results=count, order_by=["version_number DESC"])
        known = {str(version.version): version for version in newest}
        known |= {version: client.get_model_version(name, version) for version in aliased if version not in known}
    return sorted(known.values(), key=lambda version: -int(version.version))


def registered_models(client: MlflowClient) -> Iterator[RegisteredModel]:
    """All registered models."""
    token = None
    while token != "":
        page = client.search_registered_models(page_token=token)
        yield from page
        token = page.token or ""


def _create_registered_model(client: MlflowClient, name: str) -> None:
    description = (
        "GGUFs that SAMQ built and measured. Each version points at a file; its tags give the location and the SHA-256. "
        f"The alias `{CANDIDATE_ALIAS}` marks the best candidate of the last sweep, `{PRODUCTION_ALIAS}` the version in "
        f"production, `{PREVIOUS_ALIAS}` the one before it."
    )
    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _find(client: MlflowClient, name: str, sha256: str) -> ModelVersion | None:
    """The newest version with this content."""
    versions = client.search_model_versions(f"name = '{name}' and tags.sha256 = '{sha256}'")
    return max(versions, key=lambda version: int(version.version), default=None)


def _create_version(
    client: MlflowClient,
    name: str,
    run: Run,
    model: "QuantizedModel",
    place: str,
    plan: "Plan",
    evaluation: "Evaluation",
) -> ModelVersion:
    description = _description(model, plan, evaluation)
    # mlflow.create_external_model does the same with a global tracking URI.
    logged = client.create_logged_model(
        run.info.experiment_id,
        name=re.sub(r"[/:.%\"']", "-", name),  # MLflow allows these in names of registered models, but not here
        source_run_id=run.info.run_id,
        tags={MLFLOW_MODEL_IS_EXTERNAL: "true", MLFLOW_RUN_NOTE: description, "sha256": model.sha256},
        params={key: value for key, value in run.data.params.items() if value},
        model_type="gguf",
    )
    _link_metrics(client, run, logged.model_id)
    client.finalize_logged_model(logged.model_id, "READY")
    # MLflow would look up a source `models:/<id>` with its global client. It does not look up the artifact location, and
    # a server accepts that location because it belongs to the model.
    version = client.create_model_version(
        name,
        source=logged.artifact_location,
        run_id=run.info.run_id,
        model_id=logged.model_id,
        description=description,
        tags={
            "candidate": plan.name,
            "gguf_uri": place,
            "sha256": model.sha256,
            "size_bytes": str(model.file_bytes),
            "plan_digest": model.plan_digest,
            "parent_run": run.data.tags.get("mlflow.parentRunId", ""),
        },
    )
    links = json.dumps([{"name": name, "version": version.version}])
    client.set_logged_model_tags(logged.model_id, {MLFLOW_MODEL_VERSIONS: links})
    return version


def _link_metrics(client: MlflowClient, run: Run, model_id: str) -> None:
    """Show the run's metrics on the model's page: log them again with the model's id, which does not duplicate them."""
    inputs = run.inputs.dataset_inputs if run.inputs else []
    heldout = next((item.dataset for item in inputs if HELDOUT in [tag.value for tag in item.tags]), None)
    metrics = [
        Metric(
            key=key,
            value=value,
            timestamp=run.info.start_time,
            step=0,
            model_id=model_id,
            run_id=run.info.run_id,
            dataset_name=heldout.name if heldout and key.startswith("fidelity/") else None,
            dataset_digest=heldout.digest if heldout and key.startswith("fidelity/") else None,
        )
        for key, value in run.data.metrics.items()
    ]
    client.log_batch(run.info.run_id, metrics=metrics)
    client.log_outputs(run.info.run_id, [LoggedModelOutput(model_id, step=0)])


def _description(model: "QuantizedModel", plan: "Plan", evaluation: "Evaluation") -> str:
    """Markdown for the version's page."""
    # Imported here, since they take a quarter of a second, and a rollback does not need them.
    from samq.evaluation.metrics import COLUMNS, MB
    from samq.report.description import describe_plan

    rows = [
        ("size", f"{model.file_bytes / MB:.1f} MB, {model.bits_per_weight:.2f} bits per weight"),
        *((column.heading, column.show(evaluation, spread=True)) for column in COLUMNS),
        ("sha256", f"`{model.sha256}`"),
    ]
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    return f"**{plan.name}**. {describe_plan(plan)}\n\n| | |\n| --- | --- |\n{table}\n"
