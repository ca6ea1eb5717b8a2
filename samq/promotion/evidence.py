"""What MLflow holds about a registered version: its plan, its measurements, and the references to compare it with.

A version names the run of its candidate. The artifacts of that run are the plan and the evaluation with its tables of
items. The full-precision run is its sibling under the same sweep.
"""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from samq.errors import SamqError, UnreachableError
from samq.files import ANSWERS_NAME, EVALUATION_NAME, ITEMS_NAME, PLAN_NAME
from samq.records import Evaluation, Plan
from samq.sweep.benchmarking import join_items
from samq.tracking.registry import PRODUCTION_ALIAS, RegisteredGguf, aliases, find_version, model_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """The measurements of one GGUF. `items` has a row for each item and metric, as in the benchmarks' table."""

    name: str
    evaluation: Evaluation
    items: pd.DataFrame

    def of(self, metric: str) -> pd.DataFrame:
        """The rows of one `BENCHMARK/METRIC`; no rows if it was not measured."""
        return self.items[self.items["benchmark"] + "/" + self.items["metric"] == metric]


@dataclass(frozen=True)
class Reference:
    """What a candidate is compared with, or why there is nothing to compare it with."""

    kind: str  # full precision, or production
    name: str
    measured: Measured | None
    reason: str = ""  # why `measured` is None
    expected: bool = True  # False if no such reference has to exist yet


@dataclass(frozen=True)
class Evidence:
    """Everything that the gates judge."""

    version: RegisteredGguf
    tags: Mapping[str, str]
    plan: Plan
    candidate: Measured
    references: tuple[Reference, ...]
    production: str | None  # the version that is in production now


def gather(client: MlflowClient, version: RegisteredGguf) -> Evidence:
    """Read a version's evidence; raises SamqError if MLflow no longer holds its plan and its evaluation."""
    name = f"version {version.version}"
    with reading(f"the measurements of {version.name} {name}"):
        run = client.get_run(version.run_id)
        plan, candidate = read_plan(client, run), read_measured(client, run, name)
        tags = client.get_model_version(version.name, version.version).tags
    production = aliases(client, version.name).get(PRODUCTION_ALIAS)
    return Evidence(
        version=version,
        tags=tags,
        plan=plan,
        candidate=candidate,
        references=(_full_precision(client, run), _production(client, version.name, production)),
        production=production,
    )


def production_items(client: MlflowClient, name: str) -> pd.DataFrame | None:
    """The benchmark items of the version of `name` that is in production; None if there are none."""
    version = aliases(client, name).get(PRODUCTION_ALIAS) if name in model_names(client) else None
    reference = _production(client, name, version)
    if reference.measured is None and reference.expected:
        logger.warning("cannot compare with production: %s", reference.reason)
    return reference.measured.items if reference.measured else None


def _full_precision(client: MlflowClient, run: Run) -> Reference:
    """The full-precision run of the sweep that a run belongs to."""
    kind = "full precision"
    parent = run.data.tags.get(MLFLOW_PARENT_RUN_ID, "")
    try:
        with reading("the measurements of full precision"):
            query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{parent}' and params.policy = 'full'"
            full_runs = client.search_runs([run.info.experiment_id], query, max_results=1)
            if not full_runs:
                raise SamqError(f"the sweep {parent or 'of this version'} has no full-precision run; run it again")
            return Reference(kind, kind, read_measured(client, full_runs[0], kind))
    except UnreachableError:  # what cannot be read now is not lost
        raise
    except SamqError as error:
        return Reference(kind, kind, None, str(error))


def _production(client: MlflowClient, name: str, version: str | None) -> Reference:
    """The version that is in production now."""
    kind = "production"
    if version is None:
        return Reference(kind, kind, None, "nothing is in production yet", expected=False)
    label = f"{kind} (version {version})"
    try:
        with reading(f"the measurements of version {version}, which is in production"):
            run = client.get_run(find_version(client, name, version).run_id)
            return Reference(kind, label, read_measured(client, run, label))
    except UnreachableError:
        raise
    except SamqError as error:
        return Reference(kind, label, None, str(error))


def read_plan(client: MlflowClient, run: Run) -> Plan:
    """The plan of a candidate's run."""
    with tempfile.TemporaryDirectory() as folder:
        path = client.download_artifacts(run.info.run_id, PLAN_NAME, folder)
        fields = json.loads(Path(path).read_text())
        if not isinstance(fields, dict):
            raise SamqError(f"{PLAN_NAME} of run {run.info.run_id} is not a plan; run the sweep again")
        fields.pop("schema", None)  # older runs lack it
        return Plan.model_validate(fields)


def read_measured(client: MlflowClient, run: Run, name: str) -> Measured:
    """A run's evaluation, with the items of its JSON prompts and benchmarks if it has any."""
    run_id = run.info.run_id
    with tempfile.TemporaryDirectory() as folder:
        paths = {Path(file.path).name: file.path for file in client.list_artifacts(run_id, "evaluation")}
        if EVALUATION_NAME not in paths:
            raise SamqError(f"run {run_id} has no evaluation; run the sweep again")

        def fetch(name: str) -> Path:
            return Path(client.download_artifacts(run_id, paths[name], folder))

        answers = pd.read_parquet(fetch(ANSWERS_NAME)) if ANSWERS_NAME in paths else None
        benchmarks = pd.read_parquet(fetch(ITEMS_NAME)) if ITEMS_NAME in paths else None
        return Measured(name, Evaluation.load(fetch(EVALUATION_NAME)), join_items(answers, benchmarks))


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Say in one sentence what could not be read from MLflow; raises SamqError."""
    try:
        yield
    except SamqError:
        raise
    except Exception as error:  # anybody can replace artifacts, and readers raise errors of any kind on damaged ones
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if isinstance(error, LookupError):
            reason = f"a table lacks {reason}"
        raise SamqError(f"cannot read {what} from MLflow: {reason}; run the sweep again") from error
