"""Stage: prices, what each tensor costs in each type of the ladder."""

from pathlib import Path

from samq.sensitivity.fisher import load_fisher
from samq.allocation.ladder import Ladder
from samq.allocation.prices import price_table
from samq.progress import bar
from samq.llamacpp.programs import GGUF_NAME
from samq.records import PriceTable, SensitivityMap, Toolchain
from samq.store import Artifact
from tasks.calibrate import FISHER_NAME, MAP_NAME
from tasks.convert import open_target
from tasks.stage import stage

PRICES_NAME = "prices.json"


def open_ladder(full: Artifact, rungs: dict[str, Artifact]) -> Ladder:
    """The full-precision GGUF and its rungs, as files."""
    return Ladder(full.path(GGUF_NAME), {name: rung.path(GGUF_NAME) for name, rung in rungs.items()})


def load_prices(prices: Artifact) -> PriceTable:
    """The price table in an artifact of this stage."""
    return PriceTable.load(prices.path(PRICES_NAME))


@stage("price", version=3, run_name="price the ladder", packages=("llama-cpp-python",))
def price(
    folder: Path,
    full: Artifact,
    rungs: dict[str, Artifact],
    sensitivities: Artifact,
    imatrix: Artifact | None,
    toolchain: Toolchain,
) -> None:
    """`prices.json`: bytes and predicted KL of every quantizable tensor in every type."""
    target = open_target(full, imatrix, toolchain)
    with bar("price the ladder") as progress:
        table = price_table(
            open_ladder(full, rungs),
            target.quantizable,
            SensitivityMap.load(sensitivities.path(MAP_NAME)),
            load_fisher(sensitivities.path(FISHER_NAME)),
            gguf_sha256=target.sha256,
            imatrix_sha256=target.imatrix_sha256,
            progress=progress,
        )
    table.save(folder / PRICES_NAME)
