"""Claim: a plan for a 70B-sized model (560 tensors, 8 types) is found exactly in under 1 s.

Prices are drawn at random: tensors of Llama-3-70B's shapes, sensitivities spread over three orders of magnitude.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from setting import conclude

from samq.allocation.knapsack import solve
from samq.gguf.formats import tensor_bytes
from samq.records import Price

LIMIT_S = 1.0
SHAPES = ((8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672))
TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16")


def random_prices(seed: int, layers: int = 80) -> dict[str, dict[str, Price]]:
    """Random prices in the form that rounding gives: 4^-bits, times a sensitivity of each tensor, times noise."""
    random = np.random.default_rng(seed)
    prices = {}
    for layer in range(layers):
        for kind, shape in enumerate(SHAPES):
            weights = shape[0] * shape[1]
            sensitivity = random.lognormal(0, 1.5) * weights / 1e9
            types = {}
            for name in TYPES:
                size = tensor_bytes(name, shape)
                cost = sensitivity * 4.0 ** (-8 * size / weights) * random.lognormal(0, 0.1)
                types[name] = Price(bytes=size, kl_nats=0.0 if name == "F16" else cost)
            prices[f"blk.{layer}.{kind}"] = types
    return prices


def main() -> None:
    """Print a table of solve times and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    print(f"{'seed':>4} {'bpw':>5} {'seconds':>8} {'gap':>8} {'KL':>10}")
    for seed in range(arguments.seeds):
        prices = random_prices(seed)
        weights = 80 * sum(rows * columns for rows, columns in SHAPES)
        for bits in (2.8, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.5, 8.0):
            start = time.perf_counter()
            solution = solve(prices, int(weights * bits / 8))
            seconds = time.perf_counter() - start
            cost = sum(prices[name][kind].kl_nats for name, kind in solution.types.items())
            rows.append({"seed": seed, "bits_per_weight": bits, "seconds": seconds, "gap": solution.gap, "kl": cost})
            print(f"{seed:4} {bits:5} {seconds:8.3f} {solution.gap:8.1e} {cost:10.6f}")
    slowest = max(row["seconds"] for row in rows)
    print(f"slowest: {slowest:.2f} s")
    verdicts = {f"slowest in under {LIMIT_S:g} s": slowest < LIMIT_S}
    conclude({"rows": rows, "tensors": len(prices)}, verdicts, arguments.json)


if __name__ == "__main__":
    main()
