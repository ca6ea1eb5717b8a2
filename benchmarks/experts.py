"""Claim: compensated rounding of stacked experts needs each expert's own inputs, and those of all where it saw few tokens.

The script measures the mean KLD of uniform plans of a mixture of experts, on held-out text, for three kinds of rounding:

- to the nearest value;
- compensation of everything but the experts;
- compensation of all, with experts' Gram matrices that borrow more or less from that of all experts
  (`samq.sensitivity.moments.BORROWED_TOKENS`, tokens a column).

It does so for little and for much calibration text, with the same importance matrix for all files of a length of text.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from bench import keep, parameters_of, parser
from setting import conclude

from flows.inputs import prepare
from samq.allocation.types import uniform_plan
from samq.evaluation.settings import EvaluationSettings
from samq.files import DIVERGENCE_NAME, GGUF_NAME, IMATRIX_NAME
from samq.gguf.nearest import NearestRounding
from samq.llamacpp.toolchain import find_toolchain
from samq.quantization.compensated_file import PlannedFile
from samq.quantization.compensation import write_compensated
from samq.records import Plan
from samq.sensitivity import moments
from samq.sensitivity.gram import input_moments
from samq.sensitivity.moments import Piece
from samq.workspace import Workspace
from tasks.evaluate import evaluate

MODEL = Path("../shared/models/code-moe-65m")
ALONE, POOLED = 1e-6, 1e9


def main() -> None:
    """Measure, print the table and write it as JSON."""
    arguments = parse_arguments()
    rows = [row for tokens in arguments.gram_tokens for row in at_tokens(arguments, tokens)]
    chosen, pooled, alone = (
        [row["kld"] for row in rows if row["borrowed"] == borrowed]
        for borrowed in (moments.BORROWED_TOKENS, POOLED, ALONE)
    )
    without, most = [row for row in rows if row["rounding"] == "all but experts"], max(arguments.gram_tokens)
    pairs = list(zip(chosen, without, strict=True))
    verdicts = {
        "on much text, experts' own matrices lower the KLD of every plan": all(
            one < other["kld"] for one, other in pairs if other["tokens"] == most
        ),
        "on little text they raise none by more than 1 %": all(one <= 1.01 * other["kld"] for one, other in pairs),
        "borrowing is better than an expert's own matrix or that of all, or within 1 % of the better": all(
            one <= 1.01 * min(both) for one, both in zip(chosen, zip(pooled, alone, strict=True), strict=True)
        ),
    }
    conclude({"rows": rows}, verdicts, arguments.json)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__ or "")
    options.set_defaults(
        gguf=MODEL / "model-f16.gguf", calibration=MODEL / "train_sample.txt", heldout=MODEL / "valid.txt"
    )
    options.set_defaults(work=Path(".samq/experts"), types=["Q3_K", "Q4_K"])
    options.add_argument("--gram-tokens", nargs="+", type=int, default=[2048, 49152], help="lengths of text")
    options.add_argument(
        "--borrowed", nargs="+", type=float, default=[ALONE, 0.25, 1.0, 4.0, POOLED], help="tokens a column"
    )
    return options.parse_args()


def at_tokens(arguments: argparse.Namespace, gram_tokens: int) -> list[dict[str, Any]]:
    """A row for each plan and rounding, with Gram matrices of so many tokens."""
    at = Workspace(arguments.work.absolute() / "store", find_toolchain())
    parameters = parameters_of(arguments, arguments.seed, arguments.types)
    calibration = parameters.calibration.model_copy(update={"gram_tokens": gram_tokens})
    inputs = prepare(at, parameters.model_copy(update={"calibration": calibration}))
    full, target = inputs.model.full.path(GGUF_NAME), inputs.target.open(at.toolchain)
    imatrix = inputs.layer_inputs.path(IMATRIX_NAME) if inputs.layer_inputs else None
    model, layout = inputs.model.load_with_layout(at)
    pieces = list(input_moments(model, inputs.input_text.load(), layout.weights))
    dense = [Piece(piece.part, [m for m in piece.moments if m.expert is None]) for piece in pieces]
    tokens = [m.tokens for piece in pieces for m in piece.moments if m.expert is not None]
    print(f"{gram_tokens} tokens: {min(tokens)} to {max(tokens)} an expert", flush=True)
    rows: list[dict[str, Any]] = []

    def measure(plan: Plan, rounding: str, some: Sequence[Piece], borrowed: float | None) -> None:
        def write(folder: Path) -> None:
            moments.BORROWED_TOKENS, before = borrowed or moments.BORROWED_TOKENS, moments.BORROWED_TOKENS
            file = PlannedFile.create(folder / GGUF_NAME, full, plan, {}, imatrix)
            log = folder / "errors"
            write_compensated(
                {"": file}, NearestRounding(full), NearestRounding(full, imatrix), some, log, everything=True
            )
            log.unlink(missing_ok=True)
            moments.BORROWED_TOKENS = before

        gguf = keep(
            at.store, "experts", f"{plan.digest()}-{gram_tokens}-{rounding}-{borrowed}".replace(" ", "-"), write
        )
        settings: EvaluationSettings = parameters.evaluation
        scored = pd.read_parquet(
            evaluate(at, plan.name, gguf, inputs.heldout, inputs.baseline, settings).path(DIVERGENCE_NAME)
        )
        row = {"tokens": gram_tokens, "plan": plan.name, "rounding": rounding, "borrowed": borrowed}
        rows.append(row | {"kld": float(scored["kld"].mean())})
        print("  ".join(f"{value}" for value in rows[-1].values()), flush=True)

    for kind in arguments.types:
        plan = uniform_plan(target, kind)
        measure(plan, "nearest", [], None)
        measure(plan, "all but experts", dense, None)
        for borrowed in arguments.borrowed:
            measure(plan, "all", pieces, borrowed)
    return rows


if __name__ == "__main__":
    main()
