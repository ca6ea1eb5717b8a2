"""The lock on the aliases of a registered model: one process moves them at a time.

Over SQLite it is a file lock beside the database, which the system releases when a process dies. MLflow's server has no
locks, and cannot compare and swap an alias. There, each process writes a claim, a tag of the registered model, and goes
on when it sees no other claim. Of two processes that see each other's claims, the one with the smaller claim waits and
the other gives up. A process writes its claim before it reads the others, so two never go on at once. There are
two exceptions. A claim older than `STALE_S` counts as that of a dead process. And somebody who moves an alias by MLflow's own
page or client makes no claim.
"""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from mlflow import MlflowClient

from samq.errors import SamqError
from samq.home import sqlite_folder
from samq.tracking.registry import mlflow_errors

CLAIM = "samq.claim."
STALE_S = 120.0  # moving aliases takes under a second
_PATIENCE_S = 30.0
_PAUSE_S = 0.1


@contextmanager
def alias_lock(client: MlflowClient, name: str) -> Iterator[None]:
    """Keep others who take this lock from moving the model's aliases; raises SamqError if another process holds it."""
    folder = sqlite_folder(client.tracking_uri)
    with _file_lock(folder / ".promotion.lock") if folder else _claim_lock(client, name):
        yield


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    try:
        lock = FileLock(path).acquire(_PATIENCE_S)
    except Timeout as error:
        raise SamqError(
            f"another process has held {path} for {_PATIENCE_S:.0f} seconds; end it, then try again"
        ) from error
    except OSError as error:
        raise SamqError(f"cannot lock {path}: {error.strerror}; make its folder writable") from error
    with lock:
        yield


@contextmanager
def _claim_lock(client: MlflowClient, name: str) -> Iterator[None]:
    mine = f"{CLAIM}{uuid.uuid4().hex}"
    with mlflow_errors(client, f"no model {name}"):
        client.set_registered_model_tag(name, mine, f"{time.time():.0f} {os.getpid()}")
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while claims := others(client, name, mine):
            if min(claims) < mine or time.monotonic() > deadline:
                raise SamqError(
                    f"somebody else is moving the aliases of {name}; look at `samq status {name}`, then try again"
                )
            time.sleep(_PAUSE_S)
        yield
    finally:
        with mlflow_errors(client, f"no model {name}"):
            client.delete_registered_model_tag(name, mine)


def others(client: MlflowClient, name: str, mine: str) -> list[str]:
    """The claims of other processes that are not stale."""
    with mlflow_errors(client, f"no model {name}"):
        tags = client.get_registered_model(name).tags
    now = time.time()
    return [
        key
        for key, value in tags.items()
        if key.startswith(CLAIM) and key != mine and abs(now - _claimed_at(value)) < STALE_S
    ]


def _claimed_at(value: str) -> float:
    """When a claim was made, in seconds since 1970; for a tag that somebody edited, long ago."""
    try:
        return float(value.split()[0])
    except (ValueError, IndexError):
        return 0.0
