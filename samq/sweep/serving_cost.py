"""What serving a candidate costs: GPUs for its memory, by the hour."""

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from samq import markdown
from samq.evaluation.metrics import MB, VRAM
from samq.records import Evaluation, Metric
from samq.sweep.selection import Result, percent

HOURS_PER_MONTH = 730


class CostSettings(BaseModel):
    """What serving is paid for by: GPUs, by the hour, all the time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    price_per_gpu_hour: float = Field(gt=0, description="US dollars for one GPU")
    gpu_memory_bytes: int = Field(gt=0, description="memory of one GPU")
    usable_share: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="part of it that a model can have; the driver and fragmentation take the rest",
    )

    def gpus_needed(self, vram_bytes: float) -> int:
        """GPUs that together hold so much."""
        return math.ceil(vram_bytes / (self.usable_share * self.gpu_memory_bytes))

    def monthly(self, vram_bytes: float) -> float:
        """US dollars for 730 hours of all GPUs needed."""
        return self.price_per_gpu_hour * self.gpus_needed(vram_bytes) * HOURS_PER_MONTH


def cost_metrics(evaluation: Evaluation, cost: CostSettings) -> dict[str, Metric]:
    """The cost sheet's figures of one candidate: `cost/...`; none if its VRAM was not predicted."""
    vram = evaluation.metrics.get(VRAM)
    if vram is None:
        return {}
    return {
        "cost/gpus_needed": Metric(value=cost.gpus_needed(vram.value)),
        "cost/month_usd": Metric(value=cost.monthly(vram.value)),
    }


def cost_section(shown: Sequence[Result], cost: CostSettings) -> list[str]:
    """The cost sheet of some candidates, the first of them the one to compare with."""
    vram = [result.evaluation.metrics.get(VRAM) for result in shown]
    base = vram[0]

    def month(metric: Metric | None) -> str:
        if metric is None:
            return "–"
        text = f"{cost.monthly(metric.value):,.2f}"
        if base is None or metric is base:
            return text
        return f"{text} ({percent(cost.monthly(metric.value) / cost.monthly(base.value) - 1)})"

    rows = [
        ["GPUs needed", *("–" if metric is None else str(cost.gpus_needed(metric.value)) for metric in vram)],
        ["$ per month", *map(month, vram)],
    ]
    basis = (
        f"{cost.price_per_gpu_hour:g} $ an hour and GPU of {cost.gpu_memory_bytes / MB:,.0f} MB, of which "
        f"{100 * cost.usable_share:g} % can be used; {HOURS_PER_MONTH} hours a month; GPUs for the predicted VRAM of one server."
    )
    return ["## Cost", markdown.table(["", *(result.name for result in shown)], rows), basis]
