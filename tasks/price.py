"""Stages: prices, what each tensor costs in each type of the ladder."""

from pathlib import Path

from samq.allocation.prices import price_table
from samq.files import FISHER_NAME, GRAM_NAME, PRICES_NAME
from samq.progress import bar
from samq.quantization.compensation import compensated_prices
from samq.records import PriceTable
from samq.sensitivity.fisher import load_fisher
from samq.sensitivity.gram import GramMatrices
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.calibrate import load_map
from tasks.ladder import open_ladder
from tasks.stage import stage
from tasks.target import Target


def load_prices(prices: Artifact) -> PriceTable:
    """The price table in an artifact of these stages."""
    return PriceTable.load(prices.path(PRICES_NAME))


@stage("price", version=4, run_name="price the ladder", keyed_by=("toolchain",), packages=("llama-cpp-python",))
def price(
    at: Workspace, folder: Path, target: Target, rungs: dict[str, Artifact], sensitivities: Artifact, unmeasured: str
) -> None:
    """`prices.json`: bytes and predicted KL of every quantizable tensor in every type, rounded to the nearest values."""
    opened = target.open(at.toolchain)
    with bar("price the ladder") as progress:
        table = price_table(
            open_ladder(target.full, rungs),
            opened.quantizable,
            load_map(sensitivities),
            load_fisher(sensitivities.path(FISHER_NAME)),
            gguf_sha256=opened.full.sha256,
            imatrix_sha256=opened.imatrix.sha256 if opened.imatrix else None,
            unmeasured=unmeasured,
            progress=progress,
        )
    table.save(folder / PRICES_NAME)


@stage("price_compensated", version=2, run_name="price compensated rounding", keyed_by=("device",), packages=("torch",))
def price_compensated(at: Workspace, folder: Path, prices: Artifact, grams: Artifact) -> None:
    """`prices.json`: the price table as it is with compensated rounding."""
    with bar("price compensated rounding") as progress:
        table = compensated_prices(
            load_prices(prices),
            GramMatrices(grams.path(GRAM_NAME)),
            device=at.compute_device,
            progress=progress,
        )
    table.save(folder / PRICES_NAME)
