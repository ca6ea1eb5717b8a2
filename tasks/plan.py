"""Stage: plans, one a candidate."""

import logging
from pathlib import Path

from prefect import task

from samq.allocation import threshold as allocation
from samq.allocation.threshold import ThresholdPolicy
from samq.allocation.budget import BudgetPolicy, budget_plan, parse_budget, why_doubted
from samq.allocation.target import full_plan, stock_plan
from samq.records import Plan, SensitivityMap, Toolchain
from samq.store import Artifact
from tasks.convert import open_target
from tasks.price import load_prices
from tasks.stage import stage

log = logging.getLogger("samq.plan")

PLAN_NAME = "plan.json"


def load_plan(plan: Artifact) -> Plan:
    """The plan in an artifact of this stage."""
    return Plan.load(plan.path(PLAN_NAME))


@stage("plan", version=1, run_name="plan {mixture}")
def plan_stock(folder: Path, full: Artifact, imatrix: Artifact | None, mixture: str, toolchain: Toolchain) -> None:
    """`plan.json`: a mixture of llama-quantize, or (mixture F16 or BF16) the baseline as it is."""
    target = open_target(full, imatrix, toolchain)
    plan = full_plan(target) if mixture == "full" else stock_plan(target, mixture)
    plan.save(folder / PLAN_NAME)


@stage("plan", version=3, run_name="plan threshold {threshold}")
def plan_threshold(
    folder: Path,
    full: Artifact,
    imatrix: Artifact | None,
    sensitivity: SensitivityMap,
    threshold: float | str,
    policy: ThresholdPolicy,
    toolchain: Toolchain,
) -> None:
    """`plan.json`: blocks that score above the threshold keep their bits."""
    target = open_target(full, imatrix, toolchain)
    allocation.threshold_plan(target, sensitivity, threshold, policy).save(folder / PLAN_NAME)


@stage("plan", version=4, run_name="plan budget {budget}", packages=("llama-cpp-python",))
def plan_budget(
    folder: Path,
    full: Artifact,
    imatrix: Artifact | None,
    prices: Artifact,
    budget: str,
    policy: BudgetPolicy,
    toolchain: Toolchain,
) -> None:
    """`plan.json`: the least predicted KL within the budget; a warning in the log where that is not to be relied on."""
    target, table = open_target(full, imatrix, toolchain), load_prices(prices)
    plan = budget_plan(target, table, parse_budget(budget, target), policy)
    plan.save(folder / PLAN_NAME)
    if doubt := why_doubted(plan, table):
        log.warning("%s: %s", plan.name, doubt)


@task(name="choose thresholds")
def choose_thresholds(
    full: Artifact,
    imatrix: Artifact | None,
    sensitivity: SensitivityMap,
    policy: ThresholdPolicy,
    count: int,
    toolchain: Toolchain,
) -> list[float]:
    """Thresholds at which the plan changes, so that the sweep wastes no candidate."""
    return allocation.propose_thresholds(open_target(full, imatrix, toolchain), sensitivity, policy, count)
