"""Which candidates of a sweep are worth having, and which is the best.

A candidate is worth having when no other is both smaller and closer to full precision (the Pareto front of bytes and
mean KL divergence). The best is the closest one within the limits of a `SelectionRule`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from samq.records import Evaluation, Metric, Plan, QuantizedModel

KLD = "fidelity/mean_kld_nats"
VRAM = "memory/predicted_vram_bytes"
MB = 1e6


@dataclass(frozen=True)
class Result:
    """A candidate that went all the way."""

    plan: Plan
    model: QuantizedModel
    evaluation: Evaluation
    gguf: Path
    folder: Path  # of the evaluation: evaluation.json and the parquet files
    predicted: Metric | None = None  # KL by the price table, nats per token; None where the plan's types have no price

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
class Failure:
    """A candidate that fell out, where, and why."""

    name: str
    stage: str
    reason: str


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


def exclusion(result: Result, results: Sequence[Result], rule: SelectionRule) -> str | None:
    """Why the rule does not let this candidate be the best; None if it may be."""
    if result.plan.policy == "full":
        return "the baseline"
    if result.kld is None:
        return "mean KLD was not measured"
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


def choose(results: Sequence[Result], rule: SelectionRule) -> Result | None:
    """The candidate with the lowest mean KLD of those that the rule allows, the smaller of equals; None if none is."""
    allowed = [result for result in results if exclusion(result, results, rule) is None]
    return min(allowed, key=lambda result: (result.kld.value if result.kld else math.inf, result.bytes), default=None)


def describe_rule(rule: SelectionRule) -> str:
    """Which candidates the rule compares, in words."""
    limits = []
    if rule.reference is not None:
        limits.append(f"no larger than {rule.max_size_ratio:g} times {rule.reference}")
    if rule.max_bytes is not None:
        limits.append(f"no larger than {rule.max_bytes / MB:.1f} MB")
    if rule.max_vram_bytes is not None:
        limits.append(f"within {rule.max_vram_bytes / MB:.1f} MB of predicted VRAM")
    return " ".join(("quantized candidates", " and ".join(limits))).rstrip()
