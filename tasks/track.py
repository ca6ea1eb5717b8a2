"""Task: the sweep in MLflow, and the best candidate in its registry."""

from typing import Any

from prefect import task

from samq.sweep.cost import CostSettings
from samq.progress import bar
from samq.records import CalibrationSet, ModelSource, PredictionCheck, SensitivityMap, TextSet, Toolchain
from samq.sweep.selection import Comparison, Failure, Result
from samq.sweep.significance import PairedComparison
from samq.tracking.sweep_runs import TrackedSweep, TrackingSettings, track_sweep


@task(name="track", task_run_name="track {settings.run_name}")
def track(
    settings: TrackingSettings,
    source: ModelSource,
    calibration: CalibrationSet,
    heldout: TextSet,
    toolchain: Toolchain,
    sensitivity: SensitivityMap,
    results: list[Result],
    failures: list[Failure],
    best: Result | None,
    report: str,
    comparisons: list[Comparison],
    checks: list[PredictionCheck],
    benchmarks: list[PairedComparison],
    cost: CostSettings | None,
    parameters: dict[str, Any],
    tags: dict[str, str],
) -> TrackedSweep:
    """Log parent and child runs and register the best. Not cached: each run of the flow is a run in MLflow."""
    with bar(f"track {settings.run_name}"):
        return track_sweep(
            settings,
            source=source,
            calibration=calibration,
            heldout=heldout,
            toolchain=toolchain,
            sensitivity=sensitivity,
            results=results,
            failures=failures,
            best=best,
            report=report,
            comparisons=comparisons,
            checks=checks,
            benchmarks=benchmarks,
            cost=cost,
            parameters=parameters,
            tags=tags,
        )
