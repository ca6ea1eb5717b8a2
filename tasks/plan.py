"""Stages: plans, one a candidate."""

import logging
from pathlib import Path

from samq.allocation import threshold as thresholds
from samq.allocation.budget import BudgetPolicy, budget_plan, parse_budget, why_doubted
from samq.allocation.target import full_plan, stock_plan
from samq.allocation.threshold import ThresholdPolicy, threshold_plan
from samq.files import PLAN_NAME, PRICES_NAME
from samq.records import Plan, PriceTable, SensitivityMap
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.stage import stage, step
from tasks.target import Target

log = logging.getLogger("samq.plan")

FULL = "full"  # the full-precision baseline among the candidates


def load_plan(plan: Artifact) -> Plan:
    """The plan in an artifact of these stages."""
    return Plan.load(plan.path(PLAN_NAME))


@stage("plan", version=1, run_name="plan {mixture}", keyed_by=("toolchain",))
def plan_stock(at: Workspace, folder: Path, target: Target, mixture: str) -> None:
    """`plan.json`: a mixture of llama-quantize, or (`FULL`) the baseline as it is."""
    opened = target.open(at.toolchain)
    plan = full_plan(opened) if mixture == FULL else stock_plan(opened, mixture)
    plan.save(folder / PLAN_NAME)


@stage("plan", version=5, run_name="plan threshold {threshold}", keyed_by=("toolchain",), unless_empty=("guarded",))
def plan_threshold(
    at: Workspace,
    folder: Path,
    target: Target,
    sensitivity: SensitivityMap,
    threshold: float | str,
    policy: ThresholdPolicy,
    unmeasured: str,
    guarded: dict[str, str],
) -> None:
    """`plan.json`: blocks that score above the threshold keep their bits.

    `guarded` is as for `threshold_plan`.
    """
    opened = target.open(at.toolchain)
    threshold_plan(opened, sensitivity, threshold, policy, unmeasured, guarded).save(folder / PLAN_NAME)


@stage("plan", version=5, run_name="plan budget {budget}", keyed_by=("toolchain",), packages=("llama-cpp-python",))
def plan_budget(
    at: Workspace, folder: Path, target: Target, prices: Artifact, budget: str, policy: BudgetPolicy
) -> None:
    """`plan.json`: the least predicted KL within the budget; a warning in the log where it cannot be trusted."""
    opened, table = target.open(at.toolchain), PriceTable.load(prices.path(PRICES_NAME))
    plan = budget_plan(opened, table, parse_budget(budget, opened), policy)
    plan.save(folder / PLAN_NAME)
    if doubt := why_doubted(plan, table):
        log.warning("%s: %s", plan.name, doubt)


@step("propose thresholds")
def propose_thresholds(
    at: Workspace,
    target: Target,
    sensitivity: SensitivityMap,
    policy: ThresholdPolicy,
    count: int,
    guarded: dict[str, str],
) -> list[float]:
    """Thresholds at which the plan changes, so that the sweep wastes no candidate."""
    return thresholds.propose_thresholds(target.open(at.toolchain), sensitivity, policy, count, guarded)
