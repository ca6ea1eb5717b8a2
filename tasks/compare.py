"""Task: SAMQ's candidates against llama-quantize's mixtures, on the same held-out tokens."""

from dataclasses import replace

from samq.sweep.comparison import compare_sweep
from samq.sweep.sweep import Sweep
from tasks.stage import step


@step("compare")
def compare(sweep: Sweep) -> Sweep:
    """The sweep with paired comparisons of per-token KL. Not cached: they take a second."""
    return replace(sweep, comparisons=tuple(compare_sweep(sweep.results)))
