"""Claim: below 4 bits the value of a type depends on more than the size of its rounding error, and predictions fail.

For each type the script measures how much it changes the length of weights. That is the part of the rounding error along the
weights themselves, over the weights. It also compares predicted and measured KL of all tensors at that type. Then it makes
the budget plan at the bytes of Q3_K_M from the default types, and from these with each further type. A type whose
errors all have one sign costs more in a mixture than prices without terms between weights say. Last, the script adds budget
plans from all types at fewer and fewer bits, and sorts all plans by predicted KL. Measured over predicted KL shows where second
order fails. Takes the arguments of quality.py except --bits, --seeds and --repeats, and shares its --work folder.
"""

import json
from collections import Counter

from bench import open_bench, parser
from setting import machine, versions

from samq.allocation.prices import plan_cost
from samq.allocation.target import stock_plan
from samq.allocation.types import DEFAULT_TYPES, uniform_plan
from samq.records import Plan, PriceTable

MIXTURE = "Q3_K_M"
FURTHER = ("IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
BITS = (2.5, 2.7, 2.9, 3.1, 3.3, 3.6, 4.0)  # a weight


def main() -> None:
    """Print the tables and write them as JSON."""
    arguments = parser(__doc__ or "").parse_args()
    types = (*DEFAULT_TYPES, *FURTHER)
    bench = open_bench(arguments, types=types)
    target, prices = bench.target, bench.nearest
    rows = []
    for name in types:
        plan = uniform_plan(target, name)
        row = {
            "type": name,
            "bits": plan.bits_per_weight,
            "length_change": prices.length_changes[most_common(plan)],
            "predicted": plan_cost(prices, plan.types).value,
            "measured": float(bench.measure(plan)["kld"].mean()),
        }
        rows.append(row)
        print(
            f"{name:8} length {row['length_change']:+.2%}  predicted {row['predicted']:.6f}  measured "
            f"{row['measured']:.6f}  ratio {row['measured'] / row['predicted']:.2f}",
            flush=True,
        )
    stock = stock_plan(target, MIXTURE)
    reference = float(bench.measure(stock)["kld"].mean())
    plans = []
    for further in ((), *((name,) for name in FURTHER)):
        table = only(prices, {*DEFAULT_TYPES, *further, "F16"})
        plan = bench.at_bytes(stock.tensor_bytes, table, f"size-of:{MIXTURE}")
        measured = float(bench.measure(plan)["kld"].mean())
        plans.append(
            {
                "further": further,
                "bits": plan.bits_per_weight,
                "predicted": plan.predicted_kl_nats,
                "measured": measured,
            }
        )
        print(
            f"at the bytes of {MIXTURE}, default types{''.join(f' and {name}' for name in further)}: predicted "
            f"{plan.predicted_kl_nats:.6f}  measured {measured:.6f} ({measured / reference - 1:+.1%})",
            flush=True,
        )
    weights = sum(tensor.weights for tensor in target.tensors.values())
    smaller = []
    for bits in BITS:
        plan = bench.at_bytes(int(bits * weights / 8), prices, f"{bits}bpw")
        measured = float(bench.measure(plan)["kld"].mean())
        smaller.append({"bits": plan.bits_per_weight, "predicted": plan.predicted_kl_nats, "measured": measured})
    by_distortion = sorted(
        [{"plan": f"all {row['type']}", **row} for row in rows]
        + [{"plan": " and ".join([f"at {MIXTURE}", *row["further"]]), **row} for row in plans]
        + [{"plan": "all types", **row} for row in smaller],
        key=lambda row: row["predicted"],
    )
    for row in by_distortion:
        print(
            f"{row['plan']:20} {row['bits']:5.2f} bits  predicted {row['predicted']:.6f}  measured {row['measured']:.6f}  "
            f"ratio {row['measured'] / row['predicted']:.2f}"
        )
    if arguments.json:
        result = {
            "types": rows,
            "plans": plans,
            "stock": reference,
            "budgets": smaller,
            "seed": arguments.seed,
            "versions": versions(),
            "machine": machine(),
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def most_common(plan: Plan) -> str:
    """The type of most tensors: the type of a uniform plan, or its fallback if rows do not allow it."""
    return Counter(plan.types.values()).most_common(1)[0][0]


def only(prices: PriceTable, types: set[str]) -> PriceTable:
    """The price table with these types only."""
    tensors = {
        name: tensor.model_copy(update={"types": {kind: tensor.types[kind] for kind in tensor.types if kind in types}})
        for name, tensor in prices.tensors.items()
    }
    return prices.model_copy(update={"tensors": tensors})


if __name__ == "__main__":
    main()
