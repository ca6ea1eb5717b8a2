"""Which candidates of a sweep are worth having, and which is the best.

A candidate is worth having when no other is both smaller and closer to full precision (the Pareto front of bytes and
mean KL divergence). The best is the closest one within the limits of a `SelectionRule`, and never worse than
llama-quantize's own mixtures. A plan by sensitivity must beat, with confidence, each mixture that is no larger, and those at
whose bytes it is shown. A mixture that was not measured is not known to be worse.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from samq.allocation.budget_notation import read_budget
from samq.evaluation.metrics import KLD, MB, VRAM
from samq.records import Evaluation, Metric, Plan, QuantizedModel

Finalists = Literal["front", "best", "all"]
BY_SENSITIVITY = ("threshold", "budget")  # the policies that are SAMQ's own
# Two files are of one size if they differ by no more than this share. A budget plan leaves up to a tensor's step of its
# budget idle, and the metadata of two files differ by kilobytes. That is less than this share even for a model of some 20 MB.
SAME_SIZE = 0.001
NEARLY_SAME_SIZE = 0.01  # how much smaller a plan may be to be shown at a mixture's bytes


@dataclass(frozen=True)
class Result:
    """A candidate that went all the way."""

    plan: Plan
    model: QuantizedModel
    evaluation: Evaluation
    gguf: Path
    folder: Path  # of the evaluation: evaluation.json and the parquet files
    predicted: Metric | None = None  # KL by the price table, nats per token; None where the plan's types have no price
    benchmark_folders: tuple[Path, ...] = ()  # a task each: evaluation.json and benchmarks.parquet
    # The plan's types whose rounding lengthens weights, and by how much; see samq.allocation.prices.lengthened.
    lengthened: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The candidate's name."""
        return self.plan.name

    @property
    def bytes(self) -> int:
        """Size of the GGUF."""
        return self.model.file_bytes

    @property
    def kld(self) -> Metric | None:
        """Mean KL divergence to full precision, nats per token; None if it was not measured."""
        return self.evaluation.metrics.get(KLD)


@dataclass(frozen=True)
class Comparison:
    """A candidate's mean KLD against a rival's on the same held-out tokens (made by `samq.sweep.comparison`).

    `reduction` is 1 - KLD / the rival's KLD: positive where the candidate is closer to full precision. `low` and `high`
    are its 95 % confidence interval; `low` is minus infinity where the tokens cannot tell.
    """

    candidate: str
    rival: str
    reduction: float
    low: float
    high: float

    @property
    def verdict(self) -> Literal["win", "tie", "loss"]:
        """Whether the candidate is closer to full precision, further from it, or not told apart."""
        return "win" if self.low > 0 else "loss" if self.high < 0 else "tie"

    @property
    def in_words(self) -> str:
        """The change of mean KLD with its interval: `-36.2 % mean KLD (95 % -40.1 % to -32.0 %)`."""
        interval = f"95 % {percent(-self.high)} to {percent(-self.low)}"
        if math.isinf(self.low) and math.isfinite(self.reduction):
            interval = "too little text for an interval"
        return f"{percent(-self.reduction)} mean KLD ({interval})"


def percent(change: float) -> str:
    """A relative change as text: `-36.2 %`."""
    return f"{100 * change:+.1f} %" if change < 10 else "over +1000 %"


CANDIDATE_STAGES = ("plan", "assemble", "quantize", "compensate", "evaluate")  # what every candidate goes through


@dataclass(frozen=True)
class Failure:
    """What fell out, where, and why."""

    name: str
    stage: str
    reason: str

    @property
    def of_candidate(self) -> bool:
        """Whether a candidate is lost: without a check it goes on."""
        return self.stage in CANDIDATE_STAGES


class SelectionRule(BaseModel):
    """Which candidates may be the best; of those the one with the lowest mean KL divergence is, then the smaller."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bytes: int | None = Field(default=None, gt=0, description="largest GGUF")
    max_vram_bytes: int | None = Field(default=None, gt=0, description="largest predicted VRAM")
    reference: str | None = Field(
        default="Q4_K_M", description="stock candidate that sizes are compared with; None: no such limit"
    )
    max_size_ratio: float = Field(
        default=1.10, gt=0, description="largest GGUF, as a multiple of the reference (44 GB for 40, at the start)"
    )


def by_size(results: Sequence[Result]) -> list[Result]:
    """Full precision first, then from the largest to the smallest."""
    return sorted(results, key=lambda result: (result.plan.policy != "full", -result.bytes, result.name))


def pareto(results: Sequence[Result]) -> list[str]:
    """Names of the candidates that no other beats in bytes or mean KLD without losing in the other; largest first."""
    points = {result.name: (result.bytes, result.kld.value) for result in by_size(results) if result.kld}

    def dominated(size: int, kld: float) -> bool:
        return any(s <= size and k <= kld and (s, k) != (size, kld) for s, k in points.values())

    return [name for name, point in points.items() if not dominated(*point)]


def exclusion(
    result: Result, results: Sequence[Result], rule: SelectionRule, comparisons: Sequence[Comparison] = ()
) -> str | None:
    """Why the rule does not let this candidate be the best; None if it may be.

    A plan by sensitivity needs a comparison with every stock candidate that it has to beat (`_to_beat`) and that is within the
    rule's limits itself. What was not compared is not known to be better. A plan by budget needs a
    stock candidate that was measured, and the one whose bytes it was given.
    """
    if result.plan.policy == "full":
        return "the baseline"
    if result.kld is None:
        return "mean KLD was not measured"
    limit = _limit(result, results, rule)
    if limit is None and result.plan.policy in BY_SENSITIVITY:
        return _nothing_to_beat(result, results) or _not_better(result, results, rule, comparisons)
    return limit


def _limit(result: Result, results: Sequence[Result], rule: SelectionRule) -> str | None:
    """Which limit of the rule the candidate breaks."""
    if rule.reference is not None:
        reference = next((other for other in results if other.name == rule.reference), None)
        if reference is None:
            return f"{rule.reference}, which sizes are compared with, was not measured"
        if result.bytes > rule.max_size_ratio * reference.bytes:
            ratio = result.bytes / reference.bytes
            return f"{ratio:.3f} times the size of {rule.reference}, over {rule.max_size_ratio:g}"
    if rule.max_bytes is not None and result.bytes > rule.max_bytes:
        return f"over {rule.max_bytes / MB:.1f} MB"
    if rule.max_vram_bytes is not None:
        vram = result.evaluation.metrics.get(VRAM)
        if vram is None:
            return "VRAM was not predicted"
        if vram.value > rule.max_vram_bytes:
            return f"needs {vram.value / MB:.1f} MB of VRAM, over {rule.max_vram_bytes / MB:.1f} MB"
    return None


def _nothing_to_beat(result: Result, results: Sequence[Result]) -> str | None:
    """Why what was measured cannot show that a plan by budget is no worse than llama-quantize's mixtures."""
    if result.plan.policy != "budget":
        return None
    measured = {one.name for one in stock(results) if one.kld}
    mixture = _budgeted_by(result)
    if mixture and mixture not in measured:
        return f"{mixture}, whose bytes it was given, was not measured"
    return None if measured else "no stock mixture was measured that it could be held against"


def _not_better(
    result: Result, results: Sequence[Result], rule: SelectionRule, comparisons: Sequence[Comparison]
) -> str | None:
    """The stock candidate that this one had to beat and did not; of several the one that is furthest ahead."""
    compared = {one.rival: one for one in comparisons if one.candidate == result.name}
    unbeaten = []
    for rival in _to_beat(result, results):
        if _limit(rival, results, rule) is not None:
            continue
        if rival.kld is None:
            return f"mean KLD of {rival.name}, which it has to beat, was not measured"
        if rival.name not in compared:
            return f"was not compared with {rival.name}, which it has to beat"
        if compared[rival.name].verdict != "win":
            unbeaten.append(compared[rival.name])
    if not unbeaten:
        return None
    ahead = min(unbeaten, key=lambda one: one.reduction)
    return f"does not beat {ahead.rival} with confidence: {ahead.in_words}"


def stock(results: Sequence[Result]) -> list[Result]:
    """llama-quantize's own mixtures among the candidates, from the largest to the smallest."""
    return [result for result in by_size(results) if result.plan.policy == "stock"]


def no_larger(others: Sequence[Result], result: Result) -> list[Result]:
    """Those of the others that are smaller than the result or of its size."""
    return [other for other in others if other.bytes <= result.bytes * (1 + SAME_SIZE)]


def _to_beat(result: Result, results: Sequence[Result]) -> list[Result]:
    """The stock candidates that a plan by sensitivity may not replace unless it is closer: no larger, or of its size.

    A plan that leaves bytes of its budget idle is still held against the mixture whose bytes it was given.
    """
    return [one for one in stock(results) if no_larger([one], result) or result in of_its_size(one, results)]


def of_its_size(mixture: Result, results: Sequence[Result]) -> list[Result]:
    """The plans by sensitivity to hold against a mixture, none of them larger; from the largest to the smallest.

    Those of about its size, and those whose budget its size was: they may have found nothing worth its last bytes.
    """
    plans = [result for result in by_size(results) if result.plan.policy in BY_SENSITIVITY]
    return [
        one
        for one in no_larger(plans, mixture)
        if one.bytes >= mixture.bytes * (1 - NEARLY_SAME_SIZE) or _budgeted_by(one) == mixture.name
    ]


def _budgeted_by(result: Result) -> str | None:
    """The mixture whose bytes were a plan's budget; None for other budgets and policies."""
    if result.plan.policy != "budget":
        return None
    return read_budget(str(result.plan.parameters["budget"])).mixture or None


def rival_of(result: Result, results: Sequence[Result]) -> Result | None:
    """The stock candidate to hold a result against: the largest that it has to beat, else the smallest; its own is itself."""
    if result.plan.policy == "stock":
        return result
    return next(iter(_to_beat(result, results) or stock(results)[-1:]), None)


def choose(results: Sequence[Result], rule: SelectionRule, comparisons: Sequence[Comparison] = ()) -> Result | None:
    """The candidate with the lowest mean KLD of those that the rule allows, the smaller of equals; None if none is."""
    allowed = [result for result in results if exclusion(result, results, rule, comparisons) is None]
    return min(allowed, key=lambda result: (result.kld.value if result.kld else math.inf, result.bytes), default=None)


def finalists(results: Sequence[Result], best: Result | None, which: Finalists) -> list[str]:
    """Names of the candidates that benchmarks are worth their time for: full precision first, then by size.

    Nobody else on the Pareto front of bytes and KL could be chosen for a better trade of the two.
    """
    rival = rival_of(best, results) if best else None
    chosen = {result.name for result in (best, rival) if result}
    if which == "front":
        chosen |= set(pareto(results))
    return [one.name for one in by_size(results) if which == "all" or one.plan.policy == "full" or one.name in chosen]


def describe_rule(rule: SelectionRule) -> str:
    """Which candidates the rule compares, in words; that none is worse than a stock mixture is not among them."""
    limits = []
    if rule.reference is not None:
        limits.append(f"no larger than {rule.max_size_ratio:g} times {rule.reference}")
    if rule.max_bytes is not None:
        limits.append(f"no larger than {rule.max_bytes / MB:.1f} MB")
    if rule.max_vram_bytes is not None:
        limits.append(f"within {rule.max_vram_bytes / MB:.1f} MB of predicted VRAM")
    return " ".join(("quantized candidates", " and ".join(limits))).rstrip()
