"""The folder of SAMQ's data: `.samq` in the working directory, or `SAMQ_HOME`; and places of files below it.

A place is how MLflow's tags name a file. It is relative to the SAMQ folder, so that the folder can be moved or copied. If the
file is elsewhere, it is an absolute URI.
"""

import os
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

ARTIFACTS = "mlartifacts"  # folder of MLflow's artifacts
_SQLITE = "sqlite:///"


def home() -> Path:
    """The absolute path of the SAMQ folder, which need not exist."""
    return Path(os.environ.get("SAMQ_HOME", ".samq")).absolute()


def store_folder() -> Path:
    """The root of the artifact store."""
    return home() / "store"


def mlflow_uri() -> str:
    """MLflow's tracking URI: the user's MLFLOW_TRACKING_URI, else a SQLite file in the SAMQ folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _own_database()


def registry_uris(tracking_uri: str) -> list[str]:
    """Tracking URIs of all registries that may name files of the store: this one, and the SAMQ folder's own database."""
    own = _own_database()
    return [tracking_uri, own] if own != tracking_uri and (home() / "mlflow.db").exists() else [tracking_uri]


def _own_database() -> str:
    return f"{_SQLITE}{home() / 'mlflow.db'}"


def without_password(uri: str) -> str:
    """The URI as it may be shown and logged."""
    parts = urlsplit(uri)
    return uri.replace(f":{parts.password}@", ":***@", 1) if parts.password else uri


def sqlite_file(tracking_uri: str) -> Path | None:
    """The absolute path of the SQLite file that a tracking URI names; None for a server."""
    return Path(tracking_uri.removeprefix(_SQLITE)).absolute() if tracking_uri.startswith(_SQLITE) else None


def sqlite_folder(tracking_uri: str) -> Path | None:
    """Folder of the SQLite file that a tracking URI names; None for a server."""
    file = sqlite_file(tracking_uri)
    return file.parent if file else None


def place_of(path: Path, tracking_uri: str) -> str:
    """The place of a file for the tags of this MLflow: relative if the file is below the SAMQ folder, else a file URI."""
    return relative_place(path, _base(tracking_uri)) or path.absolute().as_uri()


def relative_place(path: Path, folder: Path) -> str | None:
    """The place of a file below the folder, such as `store/candidate/KEY/model.gguf`; None for a file elsewhere."""
    for file, base in ((path.absolute(), folder), (path.resolve(), folder.resolve())):
        if file.is_relative_to(base):
            return quote(file.relative_to(base).as_posix())
    return None


def place_uri(place: str, tracking_uri: str) -> str:
    """The absolute URI of a place that this MLflow names."""
    return place if urlsplit(place).scheme else (_base(tracking_uri) / unquote(place)).as_uri()


def path_of(uri: str) -> Path | None:
    """The path that a file URI names; None for another URI."""
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _base(tracking_uri: str) -> Path:
    """What places are relative to: the folder of MLflow's SQLite file; where MLflow is a server, the SAMQ folder."""
    return sqlite_folder(tracking_uri) or home()
