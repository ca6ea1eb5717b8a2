"""A sweep: what was built and measured, and how it compares. Reports, figures and MLflow all start from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from samq.records import CalibrationSet, ModelSource, PredictionCheck, SensitivityMap, TextSet, Toolchain
from samq.sensitivity.fisher import Routing
from samq.sweep import selection
from samq.sweep.selection import Comparison, Failure, Finalists, Result, SelectionRule
from samq.sweep.significance import PairedComparison


@dataclass(frozen=True)
class MadeFrom:
    """What all candidates of a sweep have in common."""

    source: ModelSource
    calibration: CalibrationSet
    heldout: TextSet
    toolchain: Toolchain
    mmproj: Path | None = None  # the vision or audio part of a multimodal model


@dataclass(frozen=True)
class Sweep:
    """The candidates that were measured, and all that is known of them."""

    made_from: MadeFrom
    sensitivity: SensitivityMap
    results: tuple[Result, ...]
    failures: tuple[Failure, ...] = ()
    rule: SelectionRule = field(default_factory=SelectionRule)
    comparisons: tuple[Comparison, ...] = ()  # token by token, with stock mixtures
    benchmarks: tuple[PairedComparison, ...] = ()  # item by item, with full precision and production
    checks: tuple[PredictionCheck, ...] = ()  # of the budget plans' predicted KL
    routing: Routing = field(default_factory=Routing)  # of the calibration text's tokens to experts

    @cached_property
    def best(self) -> Result | None:
        """The candidate that the rule chooses; None if it allows none."""
        return selection.choose(self.results, self.rule, self.comparisons)

    @cached_property
    def by_size(self) -> list[Result]:
        """Full precision first, then from the largest to the smallest."""
        return selection.by_size(self.results)

    @cached_property
    def front(self) -> list[str]:
        """Names on the Pareto front of bytes and mean KLD, the largest first."""
        return selection.pareto(self.results)

    @property
    def full(self) -> Result | None:
        """The full-precision baseline; None if it was not measured."""
        return next((result for result in self.results if result.plan.policy == "full"), None)

    @property
    def stock(self) -> list[Result]:
        """llama-quantize's own mixtures, from the largest to the smallest."""
        return selection.stock(self.results)

    @property
    def lost(self) -> list[Failure]:
        """The candidates that failed; other failures cost none."""
        return [failure for failure in self.failures if failure.of_candidate]

    def result(self, name: str | None) -> Result | None:
        """The candidate of this name; None if it was not measured."""
        return next((result for result in self.results if result.name == name), None)

    def rival(self, result: Result) -> Result | None:
        """The stock mixture that a candidate is held against; a mixture's is itself."""
        return selection.rival_of(result, self.results)

    def of_its_size(self, mixture: Result) -> list[Result]:
        """SAMQ's plans to hold against a stock mixture, none of them larger."""
        return selection.of_its_size(mixture, self.results)

    def comparison(self, candidate: str, rival: str) -> Comparison | None:
        """The comparison of two candidates token by token; None if they were not compared."""
        return next((one for one in self.comparisons if (one.candidate, one.rival) == (candidate, rival)), None)

    def benchmark_comparison(self, metric: str, candidate: str, reference: str) -> PairedComparison | None:
        """The comparison of two on one metric's items; None if they were not compared."""
        names = (metric, candidate, reference)
        return next((one for one in self.benchmarks if (one.metric_name, one.candidate, one.reference) == names), None)

    def why_not(self, result: Result) -> str | None:
        """Why the rule does not let a candidate be the best; None if it may be."""
        return selection.exclusion(result, self.results, self.rule, self.comparisons)

    def finalists(self, which: Finalists) -> Sequence[str]:
        """Names of the candidates that benchmarks are worth their time for."""
        return selection.finalists(self.results, self.best, which)
