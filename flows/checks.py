"""How far the predicted KL of the budget plans can be trusted."""

from collections.abc import Mapping

from flows.costs import Costs
from flows.gather import Gather
from flows.inputs import Inputs
from flows.parameters import RequantizeParameters
from samq.allocation.budget_notation import plan_name
from samq.records import PredictionCheck
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.check import BuiltPlan, check, load_check
from tasks.text import LastSequences


def check_predictions(
    at: Workspace,
    inputs: Inputs,
    plans: Mapping[str, Artifact],
    ggufs: Mapping[str, Artifact],
    costs: Costs,
    parameters: RequantizeParameters,
    gather: Gather,
) -> tuple[PredictionCheck, ...]:
    """Checks of every budget plan that was built, one at a time: each holds the whole model in memory."""
    calibration, checks = parameters.calibration, dict[str, Artifact]()
    sequences = LastSequences(inputs.tokens, calibration.check_sequences)
    names = [plan_name(budget) for budget in parameters.candidates.budgets] if calibration.check_sequences else []
    for name in [name for name in names if name in ggufs]:
        candidate = BuiltPlan(name, plans[name], costs.budget_prices, ggufs[name])
        future = check.submit(at, inputs.model, sequences, candidate, calibration.batch_size, calibration.seed)
        checks |= gather("check", {name: future})
    return tuple(map(load_check, checks.values()))
