"""Claim: a large tensor's price is known from a sample of its rows, and plans made from samples are as good.

Every tensor with more rows is priced from samples of --rows rows. They are drawn as samq.allocation.price_rows draws them for
tensors of over 2^25 weights, which this model need not have. The table has for each size of sample:

- the error of a sampled price relative to the exact one, over tensors and types: the median and the largest;
- the error of the predicted KL of the budget plan at Q4_K_M's bytes;
- what that plan loses if it is made from sampled prices: its exact predicted KL, relative to that of the plan from exact prices;
- the seconds that pricing takes.

Takes the arguments of quality.py (--samples makes it short) except --bits, --seeds and --repeats, and shares its --work folder.
"""

import sys
import time
from contextlib import contextmanager

import numpy as np
from bench import Bench, open_bench, parser
from setting import conclude

from samq.allocation import price_rows
from samq.allocation.prices import plan_cost, price_table
from samq.allocation.target import stock_plan
from samq.allocation.types import legal_types
from samq.files import FISHER_NAME
from samq.records import PriceTable
from samq.sensitivity.fisher import load_fisher

MIXTURE = "Q4_K_M"
BUDGET = f"size-of:{MIXTURE}"
LOSS = 0.001  # of the plan's predicted KL, with at least as many rows as SAMQ takes


def main() -> None:
    """Measure, print the table and write it as JSON; exits 1 if plans from samples as large as SAMQ's lose more."""
    options = parser(__doc__ or "")
    options.add_argument("--rows", type=int, nargs="+", default=[128, 256, 512, 1024], help="sizes of samples")
    arguments = options.parse_args()
    bench = open_bench(arguments)
    exact, seconds = priced(bench, None)
    budget = stock_plan(bench.target, MIXTURE).tensor_bytes
    best = bench.at_bytes(budget, exact, BUDGET)
    print(f"all rows: {seconds:.1f} s, predicted KL at {MIXTURE}'s bytes {plan_cost(exact, best.types).value:.5f} nats")
    rows = []
    for count in arguments.rows:
        sampled, seconds = priced(bench, count)
        errors = price_errors(bench, exact, sampled, count)
        plan = bench.at_bytes(budget, sampled, BUDGET)
        known = plan_cost(exact, best.types).value
        row = {
            "rows": count,
            "seconds": seconds,
            "tensors": len({name for name, _ in errors}),
            "median_error": float(np.median(list(errors.values()))),
            "largest_error": max(errors.values()),
            "error_of_plan": plan_cost(sampled, best.types).value / known - 1,
            "loss_of_plan": plan_cost(exact, plan.types).value / known - 1,
        }
        rows.append(row)
        print(
            f"{count:5} rows of {row['tensors']} tensors: {seconds:5.1f} s, prices off by {row['median_error']:.2%} "
            f"(largest {row['largest_error']:.2%}), the plan's KL by {row['error_of_plan']:+.2%}; "
            f"the plan from them is worse by {row['loss_of_plan']:.3%}"
        )
    result = {
        "samples": rows,
        "gguf": arguments.gguf.name,
        "model_bytes": bench.target.full.path.stat().st_size,
        "types": bench.types,
        "seed": arguments.seed,
        "calibration_sequences": bench.costs.sensitivity.samples,
    }
    verdicts = {
        f"{row['rows']} rows: a plan made from them loses at most {LOSS:.1%}": row["loss_of_plan"] <= LOSS
        for row in rows
        if row["rows"] >= price_rows.SAMPLED_ROWS
    }
    conclude(result, verdicts, arguments.json)


def priced(bench: Bench, rows: int | None) -> tuple[PriceTable, float]:
    """Prices from samples of so many rows, or from all; and the seconds that they took."""
    target, sensitivities = bench.target, bench.costs.sensitivities
    with samples_of(rows):
        started = time.perf_counter()
        fisher = load_fisher(sensitivities.path(FISHER_NAME))
        table = price_table(target, legal_types(target, bench.types), bench.costs.sensitivity, fisher)
        return table, time.perf_counter() - started


@contextmanager
def samples_of(rows: int | None):
    """Price every tensor from a sample of so many rows; None: from all rows."""
    usual = price_rows.LARGEST_WITHOUT_SAMPLE, price_rows.SAMPLED_WEIGHTS, price_rows.SAMPLED_ROWS
    price_rows.LARGEST_WITHOUT_SAMPLE = 0 if rows else sys.maxsize
    price_rows.SAMPLED_WEIGHTS, price_rows.SAMPLED_ROWS = 0, rows or 0
    try:
        yield
    finally:
        price_rows.LARGEST_WITHOUT_SAMPLE, price_rows.SAMPLED_WEIGHTS, price_rows.SAMPLED_ROWS = usual


def price_errors(bench: Bench, exact: PriceTable, sampled: PriceTable, rows: int) -> dict[tuple[str, str], float]:
    """(tensor, type) -> relative error of the sampled price, for tensors with more rows than the sample."""
    return {
        (name, kind): abs(sampled.tensors[name].types[kind].kl_nats / price.kl_nats - 1)
        for name, tensor in exact.tensors.items()
        if bench.target.quantizable[name].weights > rows * bench.target.quantizable[name].row_length
        for kind, price in tensor.types.items()
        if price.kl_nats
    }


if __name__ == "__main__":
    main()
