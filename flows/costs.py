"""What tensors cost in each type: calibrate and price, on as many sequences as it takes to know the budgets' plans."""

from dataclasses import dataclass
from functools import cached_property

from flows.gather import Gather
from flows.inputs import Inputs
from flows.parameters import RequantizeParameters
from samq.allocation.prices import plan_cost, sequences_wanted
from samq.files import FISHER_NAME
from samq.records import PriceTable, Rounding, SensitivityMap
from samq.sensitivity.fisher import Routing, load_fisher, routing
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.calibrate import Passes, calibrate, load_map
from tasks.plan import load_plan, plan_budget
from tasks.price import load_prices, price, price_compensated
from tasks.text import FirstSequences


@dataclass(frozen=True)
class Costs:
    """Sensitivities, and prices with weights rounded to the nearest values and as the budgets' plans round them."""

    sensitivities: Artifact
    prices: Artifact
    budget_prices: Artifact

    @property
    def sensitivity(self) -> SensitivityMap:
        """The map that threshold plans are made from."""
        return load_map(self.sensitivities)

    @cached_property
    def routing(self) -> Routing:
        """Which experts the calibration text reached too seldom."""
        return routing(load_fisher(self.sensitivities.path(FISHER_NAME)), self.scarce_experts)

    @cached_property
    def scarce_experts(self) -> dict[str, dict[int, int]]:
        """Tensor -> number of an expert -> its tokens, if they were too few."""
        return load_prices(self.prices).scarce_experts

    @property
    def tables(self) -> dict[Rounding, PriceTable]:
        """Rounding -> prices."""
        return {table.rounding: table for table in map(load_prices, (self.prices, self.budget_prices))}


def measure_costs(at: Workspace, inputs: Inputs, types: list[str], parameters: RequantizeParameters) -> Costs:
    """Calibrate on more and more sequences, until every budget plan's predicted KL is known precisely enough."""
    calibration, candidates = parameters.calibration, parameters.candidates
    passes = Passes(calibration.batch_size, calibration.labels, calibration.seed)
    count = min(calibration.first_sequences, inputs.available) if candidates.budgets else inputs.available
    sensitivities: Artifact | None = None
    while True:
        sensitivities = calibrate(at, inputs.model, FirstSequences(inputs.tokens, count), sensitivities, passes)
        prices = price(at, inputs.target, types, sensitivities, candidates.unmeasured_type)
        compensable = inputs.layer_inputs if candidates.compensated else None
        budget_prices = price_compensated(at, prices, compensable) if compensable else prices
        plans = Gather()(
            "plan",
            {
                budget: plan_budget.submit(at, inputs.target, budget_prices, budget, candidates.budget_policy)
                for budget in candidates.budgets
            },
        )
        table = load_prices(budget_prices)
        predictions = [plan_cost(table, load_plan(plan).types) for plan in plans.values()]
        enough = sequences_wanted(predictions, calibration.precision, measured=count, available=inputs.available)
        if enough == count:
            return Costs(sensitivities, prices, budget_prices)
        count = enough
