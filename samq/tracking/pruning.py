"""What a store no longer needs: `samq prune` and the deployment of that name.

An artifact goes by its last use. What a registered version of MLflow names stays, and so does what may be in use.
"""

import math
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from mlflow import MlflowClient
from pydantic import BaseModel, ByteSize, ConfigDict, Field, model_validator

from samq.shared_store import SharedStore, Stored
from samq.store import Artifact, Store
from samq.store_cache import last_use, oldest_start
from samq.tracking.aliased import (
    aliased_content,
    aliased_files,
    check_none_is_missing,
    registered_content,
    registries,
)
from samq.tracking.registry import mlflow_errors
from samq.tracking.tracked import SWEEPS, newest_runs

DAY_S = 86400.0
# A run on another machine may be at work for so long on what it found in a shared store; it cannot be asked.
RUN_S = 2 * DAY_S


class PruneRules(BaseModel):
    """What may go. At least one rule is needed; what one of them names goes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    older_than_days: float | None = Field(default=None, ge=0, description="what no run has used for so many days")
    keep_sweeps: int | None = Field(default=None, ge=0, description="what none of the newest sweeps in MLflow has used")
    max_bytes: ByteSize | None = Field(
        default=None, description="what was used least recently, until the store is no larger, such as 200GB"
    )

    @model_validator(mode="after")
    def _has_a_rule(self) -> "PruneRules":
        if self.older_than_days is None and self.keep_sweeps is None and self.max_bytes is None:
            raise ValueError("no rule says what may go; give one of older_than_days, keep_sweeps and max_bytes")
        return self


@dataclass(frozen=True)
class Unneeded:
    """What may go, and how much there is in all."""

    artifacts: tuple[Stored, ...]
    bytes_of_all: int
    unused_since: float  # logs of failures that were written before that time go too

    @property
    def bytes(self) -> int:
        """What their removal frees."""
        return sum(artifact.bytes for artifact in self.artifacts)

    def by_stage(self) -> dict[str, tuple[int, int]]:
        """Stage -> number and bytes of its artifacts, largest first."""
        stages: dict[str, list[int]] = defaultdict(list)
        for artifact in self.artifacts:
            stages[artifact.stage].append(artifact.bytes)
        rows = {stage: (len(sizes), sum(sizes)) for stage, sizes in stages.items()}
        return dict(sorted(rows.items(), key=lambda row: -row[1][1]))


def find_unneeded(
    store: Store, shared: SharedStore | None, tracking_uri: str, rules: PruneRules, *, even_if_missing: bool = False
) -> Unneeded:
    """What the rules let go, of the shared store if there is one, else of `store`. Changes nothing.

    Raises SamqError if a file that an alias points at is missing, unless `even_if_missing`: the store may be the wrong one.
    """
    artifacts = shared.artifacts() if shared else stored(store)
    clients = registries(tracking_uri)
    files = aliased_files(clients)
    if not even_if_missing:
        contents = {content for artifact in artifacts for content in artifact.contents}
        check_none_is_missing(files, store, contents if shared else ())
    keep = aliased_content(files) | registered_content(clients)
    unused_since = -math.inf
    if rules.older_than_days is not None:
        unused_since = time.time() - rules.older_than_days * DAY_S
    if rules.keep_sweeps is not None:
        unused_since = max(unused_since, before_sweeps(clients, rules.keep_sweeps))
    in_use_since = oldest_start(store) if shared is None else min(oldest_start(store), time.time() - RUN_S)
    gone = choose(artifacts, unused_since, rules.max_bytes, keep, in_use_since)
    return Unneeded(tuple(gone), sum(artifact.bytes for artifact in artifacts), unused_since)


def remove_unneeded(store: Store, shared: SharedStore | None, unneeded: Unneeded) -> None:
    """Remove artifacts from both stores, and old logs of failures; what is needed again is made again."""
    for artifact in unneeded.artifacts:
        store.remove(artifact.stage, artifact.key, shared)
    store.remove_logs(unneeded.unused_since)


def choose(
    artifacts: Collection[Stored],
    unused_since: float,
    most_bytes: int | None,
    keep: Collection[str],
    in_use_since: float,
) -> Sequence[Stored]:
    """The artifacts that go, least recently used first.

    Those last used before `unused_since` go, and then more until all that stay have `most_bytes` at most. None goes with a file
    whose SHA-256 is in `keep`, or that was used since `in_use_since`.
    """
    excess = sum(artifact.bytes for artifact in artifacts) - most_bytes if most_bytes is not None else 0
    gone = []
    for artifact in sorted(artifacts, key=lambda one: (one.last_use, one.stage, one.key)):
        if artifact.last_use >= in_use_since or not artifact.contents.isdisjoint(keep):
            continue
        if artifact.last_use < unused_since or excess > 0:
            gone.append(artifact)
            excess -= artifact.bytes
    return gone


def stored(store: Store) -> list[Stored]:
    """The artifacts of a local store."""
    return [_stored(artifact) for artifact in store.artifacts()]


def _stored(artifact: Artifact) -> Stored:
    entries = artifact.files.values()
    size, contents = sum(entry.bytes for entry in entries), frozenset(entry.sha256 for entry in entries)
    return Stored(artifact.stage, artifact.key, size, last_use(artifact), contents)


def before_sweeps(clients: Iterable[MlflowClient], count: int) -> float:
    """The time before which the newest `count` sweeps have used nothing: a sweep is tracked at its end.

    It is that of the sweep before them, in seconds since 1970; minus infinity if there is none.
    """
    times: list[float] = []
    for client in clients:
        with mlflow_errors(client, "no such run"):
            runs = newest_runs(client, client.search_experiments(), SWEEPS, count + 1)
        times += [run.info.start_time / 1000 for run in runs]
    return sorted(times, reverse=True)[count] if len(times) > count else -math.inf
