"""MLflow's SQLite file of a SAMQ folder, copied into a PostgreSQL database that several machines can use.

Rows are copied as they are, so runs, versions, aliases and tags keep their names and numbers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy
from alembic.migration import MigrationContext
from mlflow import MlflowClient
from mlflow.store.db.base_sql_model import Base
from sqlalchemy import Connection, Table, create_engine, func, inspect, select, text
from sqlalchemy.exc import SQLAlchemyError

from samq.errors import SamqError
from samq.home import ARTIFACTS, without_password
from samq.relocation import PATHS
from samq.shared_store import SharedStore
from samq.tracking.patience import unusable
from samq.tracking.registry import connect

_ROWS = 2000  # at a time
_OWN = "alembic_version"  # of the schema itself
_SERVED = "mlflow-artifacts:/"  # what a server with --artifacts-destination calls that place


def migrate(
    database: Path, target_uri: str, artifacts: str | None, progress: Callable[[int, int], None]
) -> dict[str, int]:
    """Copy all rows of MLflow's SQLite file into a PostgreSQL database, all or none: table -> rows.

    Args:
        database: the file, in a SAMQ folder.
        target_uri: of an empty database.
        artifacts: the `--artifacts-destination` of the MLflow server to come, any place that fsspec reaches. The files of runs
            are copied there first, and the rows name them as that server does. None: they stay where they are.
        progress: gets the number of rows copied, and of all.

    Raises SamqError if the file is missing or has a table that is not copied, or if the target is no PostgreSQL database or
    has runs or models already; UnreachableError if a place cannot be used.
    """
    if not database.is_file():
        raise SamqError(f"there is no {database} to copy; run `samq demo`, or name its folder by SAMQ_HOME")
    if not target_uri.startswith("postgresql"):
        raise SamqError(
            f"cannot copy to {without_password(target_uri)}; name a database such as postgresql://USER@HOST/DATABASE"
        )
    source_uri, folder = f"sqlite:///{database}", database.parent
    connect(source_uri)  # brings its paths and, as all clients do, its tables up to date
    _require_unused(connect(target_uri), target_uri)
    if artifacts and (folder / ARTIFACTS).is_dir():
        SharedStore(artifacts).put_folder(folder / ARTIFACTS, ARTIFACTS)
    source, target = create_engine(source_uri), create_engine(target_uri)
    try:
        with source.connect() as rows, target.begin() as goal:
            ours, theirs = (MigrationContext.configure(one).get_current_revision() for one in (rows, goal))
            if ours != theirs:
                raise SamqError(
                    f"{database} has MLflow's schema {ours}, and the target {theirs}; use one version of MLflow"
                )
            return _copy(rows, goal, folder if artifacts else None, progress)
    except SQLAlchemyError as error:
        raise unusable(target_uri, error) from error
    finally:
        source.dispose()
        target.dispose()


def _require_unused(client: MlflowClient, uri: str) -> None:
    experiments = client.search_experiments()
    used = [experiment.name for experiment in experiments if experiment.experiment_id != "0"]
    used += [run.info.run_name for run in client.search_runs(["0"], max_results=1)]
    used += [model.name for model in client.search_registered_models(max_results=1)]
    if used:
        raise SamqError(f"{without_password(uri)} is in use: it has {used[0]}; name an empty database")


def _copy(
    source: Connection, target: Connection, moved: Path | None, progress: Callable[[int, int], None]
) -> dict[str, int]:
    """Copy the rows; `moved` is the folder whose artifacts a server now has."""
    tables = Base.metadata.sorted_tables  # those that others refer to come first
    there = set(inspect(source).get_table_names()) - {_OWN}
    counts = {name: _count(source, name) for name in there}
    unknown = [name for name in there - {table.name for table in tables} if counts[name]]
    if unknown:
        raise SamqError(f"this MLflow has a table {min(unknown)}, which would not be copied; use MLflow's own tools")
    for table in reversed(tables):
        target.execute(table.delete())  # what MLflow makes by itself
    done, total = 0, sum(counts.values())
    for table in tables:
        for part in source.execute(select(table)).mappings().partitions(_ROWS):
            target.execute(table.insert(), [_with_places(table.name, {**row}, moved) for row in part])
            done += len(part)
            progress(done, total)
        _go_on_counting(target, table)
        if (copied := _count(target, table.name)) != counts[table.name]:
            raise SamqError(
                f"{table.name} has {copied} rows instead of {counts[table.name]}; nothing was copied, try again"
            )
    return {table.name: counts[table.name] for table in tables}


def _with_places(table: str, row: dict[str, Any], moved: Path | None) -> dict[str, Any]:
    """The row, with paths of artifacts below `moved` as a server names them."""
    for of_table, column in PATHS:
        path = row.get(column) if of_table == table else None
        if moved and path and Path(path).is_relative_to(moved / ARTIFACTS):
            row[column] = _SERVED + Path(path).relative_to(moved).as_posix()
    return row


def _count(connection: Connection, table: str) -> int:
    return int(connection.execute(select(func.count()).select_from(text(f'"{table}"'))).scalar_one())


def _go_on_counting(target: Connection, table: Table) -> None:
    """Let PostgreSQL number new rows after those that were copied."""
    for column in table.primary_key.columns:
        if isinstance(column.type, sqlalchemy.Integer) and column.autoincrement:
            sequence = target.execute(
                text("SELECT pg_get_serial_sequence(:table, :column)"), {"table": table.name, "column": column.name}
            ).scalar()
            last = target.execute(select(func.max(column))).scalar()
            if sequence and last is not None:
                target.execute(text("SELECT setval(:sequence, :last)"), {"sequence": sequence, "last": last})
