"""Stages: the types to price, and prices: what each tensor costs in each of them."""

from collections.abc import Collection, Iterable
from pathlib import Path

from samq.allocation.prices import price_table
from samq.allocation.threshold import ThresholdPolicy
from samq.allocation.types import legal_types, threshold_types, types_to_price
from samq.files import FISHER_NAME, PRICES_NAME, SHARES_NAME
from samq.progress import bar
from samq.quantization.compensation import compensated_prices
from samq.records import CompensationShares, PriceTable
from samq.sensitivity.fisher import load_fisher
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.calibrate import load_map
from tasks.plan import load_plan
from tasks.stage import stage, step
from tasks.target import Target


def load_prices(prices: Artifact) -> PriceTable:
    """The price table in an artifact of these stages."""
    return PriceTable.load(prices.path(PRICES_NAME))


@step("choose types")
def choose_types(
    at: Workspace,
    target: Target,
    types: Collection[str],
    plans: Iterable[Artifact] = (),
    policy: ThresholdPolicy | None = None,
) -> list[str]:
    """The types to price: these, those of the plans, and those of the threshold plans of a policy."""
    opened = target.open(at.toolchain)
    wanted = {*types, *(threshold_types(opened, policy) if policy else ())}
    return types_to_price(opened, wanted, map(load_plan, plans))


@stage("price", version=6, run_name="price types", keyed_by=("toolchain",), packages=("llama-cpp-python",))
def price(
    at: Workspace, folder: Path, target: Target, types: list[str], sensitivities: Artifact, unmeasured: str
) -> None:
    """`prices.json`: bytes and predicted KL of every quantizable tensor in these types, rounded to the nearest values."""
    opened = target.open(at.toolchain)
    with bar("price types") as progress:
        table = price_table(
            opened,
            legal_types(opened, types),
            load_map(sensitivities),
            load_fisher(sensitivities.path(FISHER_NAME)),
            unmeasured=unmeasured,
            progress=progress,
        )
    table.save(folder / PRICES_NAME)


@stage("price_compensated", version=3, run_name="price compensated rounding")
def price_compensated(at: Workspace, folder: Path, prices: Artifact, inputs: Artifact) -> None:
    """`prices.json`: the price table as it is with compensated rounding, by the shares in an artifact of `layer_inputs`."""
    shares = CompensationShares.load(inputs.path(SHARES_NAME)).shares
    compensated_prices(load_prices(prices), shares).save(folder / PRICES_NAME)
