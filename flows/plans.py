"""The plans of SAMQ's own candidates: one for each threshold and budget."""

from flows.costs import Costs
from flows.gather import Gather
from flows.inputs import Inputs
from flows.parameters import CandidateParameters
from samq.allocation.budget_notation import plan_name
from samq.allocation.threshold import threshold_name
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.plan import plan_budget, plan_threshold, propose_thresholds


def plan_candidates(
    at: Workspace, inputs: Inputs, costs: Costs, candidates: CandidateParameters, gather: Gather
) -> dict[str, Artifact]:
    """Name -> plan."""
    sensitivity, target, policy = costs.sensitivity, inputs.target, candidates.policy
    guarded = policy.guarded(costs.scarce_experts)
    thresholds = [*candidates.thresholds]
    if count := candidates.proposed_thresholds:
        thresholds += propose_thresholds(at, target, sensitivity, policy, count, guarded)
    by_threshold = {
        threshold_name(threshold): plan_threshold.submit(
            at, target, sensitivity, threshold, policy, candidates.unmeasured_type, guarded
        )
        for threshold in thresholds
    }
    by_budget = {
        plan_name(budget): plan_budget.submit(at, target, costs.budget_prices, budget, candidates.budget_policy)
        for budget in candidates.budgets
    }
    return gather("plan", by_threshold | by_budget)
