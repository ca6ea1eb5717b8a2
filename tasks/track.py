"""Task: the sweep in MLflow, and the best candidate in its registry."""

from prefect import task

from samq.progress import bar
from samq.sweep.sweep import Sweep
from samq.tracking.sweep_runs import track_sweep
from samq.tracking.tracked import TrackedSweep, TrackingSettings


@task(name="track", task_run_name="track {settings.run_name}")
def track(settings: TrackingSettings, sweep: Sweep, report: str, drift: str | None = None) -> TrackedSweep:
    """Log parent and child runs and register the best. Not cached: each run of the flow is a run in MLflow."""
    with bar(f"track {settings.run_name}"):
        return track_sweep(settings, sweep, report, drift)
