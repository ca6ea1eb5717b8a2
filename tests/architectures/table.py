"""The documentation's table of architectures: `python -m tests.architectures.table FOLDER` writes it from the test's rows."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"
HEADS = ["Model", "GGUF's architecture", "Measured", "Compensated", "Keep Q8_0"]
START, END = "<!-- table: make test-architectures -->\n", "\n<!-- end of table -->"


@dataclass(frozen=True)
class Row:
    """What the test found of one architecture."""

    name: str
    architecture: str  # general.architecture of its GGUF
    agreement_nats: float  # median KL of llama.cpp's predictions from torch's, in float32
    measured: float  # share of the quantizable weights
    compensated: float  # share of them whose layer's inputs are measured
    unmeasured: tuple[str, ...]

    def cells(self) -> list[str]:
        """Its row of the table, without what another machine would measure otherwise."""
        shares = [f"{100 * share:.0f} %" for share in (self.measured, self.compensated)]
        blocks = {name.split(".")[1] for name in self.unmeasured if name.startswith("blk.")}
        others = [name for name in self.unmeasured if not name.startswith("blk.")]
        kept = [*others, *(f"blk.{block}" for block in sorted(blocks, key=int))]
        return [self.name, f"`{self.architecture}`", *shares, ", ".join(f"`{name}`" for name in kept)]


def table_row(name: str) -> list[str]:
    """The row of a model in the documentation; KeyError if there is none."""
    lines = PAGE.read_text().partition(START)[2].partition(END)[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row for row in rows}[name]


def main(folder: Path) -> None:
    """Write the table from the rows that the test wrote into a folder."""
    rows = [
        Row(**json.loads(path.read_text()))
        for path in sorted(folder.glob("*.json"), key=lambda path: path.stem.lower())
    ]
    lines = [HEADS, ["---"] * len(HEADS), *(row.cells() for row in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    before, _, rest = PAGE.read_text().partition(START)
    PAGE.write_text(f"{before}{START}{table}{END}{rest.partition(END)[2]}")
    worst = max(rows, key=lambda row: row.agreement_nats)
    print(f"{len(rows)} models; predictions agree within {worst.agreement_nats:.1g} nats ({worst.name})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
