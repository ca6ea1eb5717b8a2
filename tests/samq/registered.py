"""A small SAMQ folder as a night leaves it: GGUFs in the store, a sweep in MLflow, the best of it in production."""

import dataclasses
import os
import shutil
from pathlib import Path

from samq.store import MANIFEST, Store
from samq.sweep.comparison import compare_sweep
from samq.sweep.selection import SelectionRule
from samq.sweep.sweep import Sweep
from samq.tracking.registry import PRODUCTION_ALIAS, connect
from samq.tracking.sweep_runs import track_sweep
from samq.tracking.tracked import TrackingSettings
from tests.samq.sweeps import make_sweep

NAME = "llama"
BEST = "Q4_K_M"


def uri_of(home: Path) -> str:
    """The folder's own database."""
    return f"sqlite:///{home / 'mlflow.db'}"


def make_home(home: Path, empty_database: Path, scratch: Path) -> Sweep:
    """Make the folder `home`; returns the sweep, whose best candidate is version 1 of `NAME`, in production."""
    scratch.mkdir()
    home.mkdir(parents=True)
    sweep = make_sweep(scratch, layers=1, thresholds=(), stock=(BEST,), budgets=())
    shutil.copy(empty_database, home / "mlflow.db")
    store, results = Store(home / "store"), []
    for result in sweep.results:
        with store.publish("candidate", result.model.sha256) as folder:
            shutil.copy(result.gguf, folder / "model.gguf")
        results.append(
            dataclasses.replace(
                result, gguf=store.root / "candidate" / result.model.sha256 / "model.gguf", predicted=None
            )
        )
    sweep = dataclasses.replace(
        sweep,
        results=tuple(results),
        comparisons=tuple(compare_sweep(results)),
        failures=(),
        rule=SelectionRule(reference=BEST),
    )
    settings = TrackingSettings(
        tracking_uri=uri_of(home), experiment="nights", run_name="nightly", registered_model=NAME
    )
    assert track_sweep(settings, sweep, "# Report\n").model_version == "1"
    connect(uri_of(home)).set_registered_model_alias(NAME, PRODUCTION_ALIAS, "1")
    return sweep


def age(home: Path) -> None:
    """Let nothing in the store have been used lately."""
    for manifest in home.glob(f"store/*/*/{MANIFEST}"):
        os.utime(manifest, (0, 0))
