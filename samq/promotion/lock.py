"""One at a time: what moves the aliases of a registered model holds this lock for the moment that it takes.

Over SQLite it is a file lock beside the database, which a process that dies gives back. A server has no locks, nor can it
change an alias only if it still is what it was; there, each contender leaves a claim, a tag of the registered model, and
goes on when it sees no other. Of two that see each other the one with the smaller claim waits, and the other gives up.
Since a claim is written before the others are read, two never go on at once, with two exceptions: a claim older than
`STALE_S` is taken for a dead process's, and who moves an alias by MLflow's own page or client makes no claim at all.
"""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from mlflow import MlflowClient

from samq.errors import SamqError
from samq.tracking.registry import answering, sqlite_folder

CLAIM = "samq.claim."
STALE_S = 120.0  # moving aliases takes under a second
_PATIENCE_S = 30.0
_PAUSE_S = 0.1


@contextmanager
def alone(client: MlflowClient, name: str) -> Iterator[None]:
    """Nobody else who takes this lock moves aliases of the model meanwhile; raises SamqError if somebody is at it."""
    folder = sqlite_folder(client.tracking_uri)
    with _locked(folder / ".promotion.lock") if folder else _claimed(client, name):
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        locked = FileLock(path).acquire()
    except OSError as error:
        raise SamqError(f"cannot lock {path}: {error.strerror}; make its folder writable") from error
    with locked:
        yield


@contextmanager
def _claimed(client: MlflowClient, name: str) -> Iterator[None]:
    mine = f"{CLAIM}{uuid.uuid4().hex}"
    with answering(client, f"no model {name}"):
        client.set_registered_model_tag(name, mine, f"{time.time():.0f} {os.getpid()}")
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while others := _others(client, name, mine):
            if min(others) < mine or time.monotonic() > deadline:
                raise SamqError(
                    f"somebody else is moving the aliases of {name}; look at `samq status {name}`, try again"
                )
            time.sleep(_PAUSE_S)
        yield
    finally:
        with answering(client, f"no model {name}"):
            client.delete_registered_model_tag(name, mine)


def _others(client: MlflowClient, name: str, mine: str) -> list[str]:
    """The claims of others that are not stale."""
    with answering(client, f"no model {name}"):
        tags = client.get_registered_model(name).tags
    now = time.time()
    return [
        key
        for key, value in tags.items()
        if key.startswith(CLAIM) and key != mine and now - float(value.split()[0]) < STALE_S
    ]
