"""Task: SAMQ's candidates against llama-quantize's mixtures, on the same held-out tokens."""

from prefect import task

from samq.sweep.comparison import compare_sweep
from samq.sweep.selection import Comparison, Result


@task(name="compare")
def compare(results: list[Result]) -> list[Comparison]:
    """Paired comparisons of per-token KL. Not cached: they take a second."""
    return compare_sweep(results)
