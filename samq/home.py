"""Where SAMQ keeps what it makes: one folder, `.samq` below the working directory, or `SAMQ_HOME`."""

import os
from pathlib import Path


def home() -> Path:
    """The SAMQ folder (absolute; not created here)."""
    return Path(os.environ.get("SAMQ_HOME", ".samq")).absolute()


def store_folder() -> Path:
    """Root of the artifact store."""
    return home() / "store"


def mlflow_uri() -> str:
    """MLflow's tracking URI: the user's MLFLOW_TRACKING_URI, else a SQLite file in the SAMQ folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"
