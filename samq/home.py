"""The folder of SAMQ's data: `.samq` in the working directory, or `SAMQ_HOME`."""

import os
from pathlib import Path


def home() -> Path:
    """The absolute path of the SAMQ folder, which need not exist."""
    return Path(os.environ.get("SAMQ_HOME", ".samq")).absolute()


def store_folder() -> Path:
    """The root of the artifact store."""
    return home() / "store"


def mlflow_uri() -> str:
    """MLflow's tracking URI: the user's MLFLOW_TRACKING_URI, else a SQLite file in the SAMQ folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"
