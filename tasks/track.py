"""Task: the sweep in MLflow, and the best candidate in its registry."""

from prefect import task

from samq.selection import Failure, Result
from samq.tracking import SweepFacts, TrackedSweep, track_sweep


@task(name="track", task_run_name="track {facts.name}")
def track(
    tracking_uri: str,
    experiment: str,
    facts: SweepFacts,
    results: list[Result],
    failures: list[Failure],
    best: Result | None,
    markdown: str,
    registered_model: str | None,
) -> TrackedSweep:
    """Log parent and child runs and register the best. Not cached: each run of the flow is a run in MLflow."""
    return track_sweep(tracking_uri, experiment, facts, results, failures, best, markdown, registered_model)
