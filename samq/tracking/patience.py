"""Patience with MLflow's database: a call that finds it locked is tried again, and what then fails is one sentence.

SQLite lets one process write at a time. MLflow's own calls wait 20 seconds for a lock, but not where two processes would
wait for each other: SQLite then fails at once. A call that failed has changed nothing, since MLflow rolls it back.
"""

import logging
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from functools import wraps
from pathlib import Path
from typing import Any, cast

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from samq.errors import SamqError, UnreachableError
from samq.home import without_password

PATIENCE_S = 20.0  # for a database that another process holds when SAMQ opens it
_ATTEMPTS = 3
_PAUSE_S = 0.5


class _Patient:
    """Any client of MLflow, whose calls wait for a locked database."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._client, name)
        return _patiently(attribute, self._client.tracking_uri) if callable(attribute) else attribute


def patient(client: Any) -> MlflowClient:
    """The client, with calls that wait for a locked database; they raise UnreachableError if it stays locked or fails."""
    return cast(MlflowClient, _Patient(client))


def check_database(path: Path, tracking_uri: str) -> None:
    """Wait until a SQLite file can be read; raises UnreachableError if it is locked, is none, or cannot be opened.

    MLflow would try a file that it cannot open for more than a minute.
    """
    if not path.exists():
        return
    if not path.is_file():
        raise UnreachableError(f"cannot use MLflow at {tracking_uri}: {path} is not a file; name another")
    try:
        with closing(sqlite3.connect(path, timeout=PATIENCE_S)) as database:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        raise unusable(tracking_uri, error) from error


def check_server(tracking_uri: str) -> None:
    """Raise UnreachableError if a database server does not answer: MLflow would try for more than a minute.

    Raises SamqError if the server's Python package is missing.
    """
    from sqlalchemy import create_engine  # slow, and not loaded where MLflow is a server

    try:
        engine = create_engine(tracking_uri)
    except ImportError as error:
        shown = without_password(tracking_uri)
        raise SamqError(f"cannot use MLflow at {shown}: {error}; install samq[postgres], or that package") from error
    try:
        with engine.connect():
            pass
    except Exception as error:
        if not is_of_database(error):
            raise
        raise unusable(tracking_uri, error) from error
    finally:
        engine.dispose()


def quiet_mlflow() -> None:
    """Keep MLflow from logging tracebacks of database errors: `unusable` reports them."""
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def unusable(tracking_uri: str, error: Exception) -> UnreachableError:
    """What to tell a person when MLflow cannot be used."""
    tracking_uri = without_password(tracking_uri)
    if is_locked(error):
        return UnreachableError(
            f"MLflow's database at {tracking_uri} stays locked by another process; wait until that ends, then try again"
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".;")
    advice = (
        "start its server" if tracking_uri.startswith("http") else "check the file, or set the URI to sqlite:///FILE"
    )
    return UnreachableError(f"cannot use MLflow at {tracking_uri}: {reason}; {advice}")


def is_locked(error: Exception) -> bool:
    """Whether another process holds the database; MLflow gives the reason in the error's text alone."""
    return "database is locked" in str(error) or "database table is locked" in str(error)


def is_of_database(error: Exception) -> bool:
    """Whether MLflow let an error of its database pass, as it does where it opens one."""
    from sqlalchemy.exc import SQLAlchemyError  # slow, and not loaded where MLflow is a server

    return isinstance(error, SQLAlchemyError)


def _patiently(call: Callable[..., Any], tracking_uri: str) -> Callable[..., Any]:
    @wraps(call)
    def patient_call(*arguments: Any, **options: Any) -> Any:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return call(*arguments, **options)
            except Exception as error:
                locked = is_locked(error)
                if locked and attempt < _ATTEMPTS:
                    time.sleep(_PAUSE_S * attempt)
                elif locked or (not isinstance(error, MlflowException) and is_of_database(error)):
                    raise unusable(tracking_uri, error) from error
                else:
                    raise
        raise AssertionError("the last attempt returns or raises")

    return patient_call
