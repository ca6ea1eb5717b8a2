"""Claim: at the bytes of llama-quantize's mixtures, with the same importance matrix, SAMQ's plans are closer to F16.

For each mixture the script measures the mixture and plans with no more bytes, on held-out text. These are the plan of least
predicted KL, with nearest and with compensated rounding, and the best threshold plan. The flow's own phases
calibrate, price, build and measure them (benchmarks/bench.py). It measures uniform plans too, so that the rank correlation
of predicted and measured KL covers all kinds of plan.

In the JSON, `samq` is the compensated plan, and `samq_nearest` shows what allocation alone achieves. `reduction` is
1 - kld_samq / kld_stock, and `ci_low` and `ci_high` are its 95 % interval, paired by chunk.

The script repeats the plans with --seeds other seeds. A seed determines the calibration sequences and the labels of the
gradients. `seeds` in the JSON has a row for each. By mixture, it has the mean KLD (`kld`) and the share of tensors of another
type than in the first seed's plan (`changed_tensors`). `seed_spread` is, by mixture, the largest mean KLD of all seeds over the
smallest, minus 1; the claim is at most 0.03. Then the script repeats everything from nothing with the first seed, --repeats
times: plans and bytes must be those of the first run. `verdicts` says of every claim whether it holds; the script exits 1 if
one does not. Set both options to 0 for a short run.
"""

import argparse
from collections.abc import Sequence

import pandas as pd
from bench import Bench, again, open_bench, parser
from setting import conclude

from samq.allocation.prices import plan_cost
from samq.allocation.target import stock_plan
from samq.allocation.threshold import ThresholdPolicy, change_points, threshold_plan
from samq.allocation.types import uniform_plan
from samq.records import Plan, PriceTable
from samq.sweep.comparison import compare

LEAST_REDUCTION = {"Q3_K_M": 0.35, "Q4_K_S": 0.35, "Q4_K_M": 0.35, "Q5_K_M": 0.2, "Q6_K": 0.12}
MIXTURES = tuple(LEAST_REDUCTION)
LEAST_SPEARMAN, LEAST_PLANS, MOST_SPREAD = 0.97, 20, 0.03
BASES = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M")


def main() -> None:
    """Measure, print the table and write it as JSON."""
    arguments = parse_arguments()
    bench = open_bench(arguments)
    compensated_plans = plans_of(bench)
    rows, priced = [], []
    for mixture, compensated in compensated_plans.items():
        row, plans = at_mixture(bench, mixture, compensated, arguments.seed)
        rows.append(row)
        priced += plans
        show(row)
    points = prediction_points(bench, [*priced, *further_plans(bench, arguments.bits)])
    spearman = rank_correlation(points)
    print(f"rank correlation of predicted and measured KL over {len(points)} plans: {spearman:.4f}")
    others = [seed for seed in range(arguments.seeds + 1) if seed != arguments.seed][: arguments.seeds]
    seeds = [other_seed(arguments, compensated_plans, seed) for seed in others]
    spread = seed_spread({row["mixture"]: row["kld_samq"] for row in rows}, seeds)
    first = identities(bench) if arguments.repeats else {}
    repeats = [identities(again(arguments, number)) for number in range(1, arguments.repeats + 1)]
    result = {
        "mixtures": rows,
        "spearman": spearman,
        "plans": points,
        "seeds": seeds,
        "seed_spread": spread,
        "repeats": repeats,
        "calibration_tokens": bench.costs.sensitivity.tokens,
        "gram_tokens": bench.parameters.calibration.gram_tokens,
        "heldout_tokens": bench.heldout_tokens,
    }
    verdicts = judge(rows, spearman, len(points)) | judge_repeats(spread, first, repeats)
    conclude(result, verdicts, arguments.json)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__ or "")
    options.add_argument("--bits", nargs="*", type=float, default=[3.6, 4.0, 4.3, 5.2, 6.0], help="further budgets")
    options.add_argument("--seeds", type=int, default=5, help="other seeds to compare with")
    options.add_argument("--repeats", type=int, default=4, help="further runs from nothing with the same seed")
    return options.parse_args()


def plans_of(bench: Bench) -> dict[str, Plan]:
    """Mixture -> the compensated plan with no more bytes. The GGUFs of all of them are built in one pass."""
    sizes = {mixture: stock_plan(bench.target, mixture).tensor_bytes for mixture in MIXTURES}
    plans = {mixture: bench.at_bytes(size, bench.compensated, f"size-of:{mixture}") for mixture, size in sizes.items()}
    bench.build_together(list(plans.values()))
    return plans


def at_mixture(bench: Bench, mixture: str, compensated: Plan, seed: int) -> tuple[dict, list[tuple[Plan, PriceTable]]]:
    """The row of a mixture's size, and its plans with the prices that predict them."""
    stock = stock_plan(bench.target, mixture)
    size, name = stock.tensor_bytes, f"size-of:{mixture}"
    plans = {
        "stock": (stock, bench.nearest),
        "samq": (compensated, bench.compensated),
        "samq_nearest": (bench.at_bytes(size, bench.nearest, name), bench.nearest),
    }
    if threshold := best_threshold_plan(bench, size):
        plans["threshold"] = (threshold, bench.nearest)
    scored = {family: bench.measure(plan) for family, (plan, _) in plans.items()}
    kld = {family: float(table["kld"].mean()) for family, table in scored.items()}
    paired = compare("samq", scored["samq"], mixture, scored["stock"], seed=seed)
    row = {
        "mixture": mixture,
        "bytes": size,
        "kld_stock": kld["stock"],
        "kld_samq": kld["samq"],
        "kld_samq_nearest": kld["samq_nearest"],
        "reduction": paired.reduction,
        "ci_low": paired.low,
        "ci_high": paired.high,
        "kld_threshold": kld.get("threshold"),
        "p999_stock": float(scored["stock"]["kld"].quantile(0.999)),
        "p999_samq": float(scored["samq"]["kld"].quantile(0.999)),
        "predicted": plans["samq"][0].predicted_kl_nats,
    }
    return row, list(plans.values())


def best_threshold_plan(bench: Bench, limit: int) -> Plan | None:
    """The threshold plan of least predicted KL within `limit` bytes over all bases; finds thresholds by bisection."""
    target, sensitivity, prices, plans = bench.target, bench.costs.sensitivity, bench.nearest, []
    for base in BASES:
        policy = ThresholdPolicy(base=base)
        cuts = [1.0, *(cut for cut, _ in change_points(sensitivity, target.quantizable, policy.grouping))]
        low, high = 0, len(cuts)  # cuts[low] fits, or nothing does; cuts[high] does not
        if threshold_plan(target, sensitivity, cuts[0], policy).tensor_bytes > limit:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            fits = threshold_plan(target, sensitivity, cuts[middle], policy).tensor_bytes <= limit
            low, high = (middle, high) if fits else (low, middle)
        plan = threshold_plan(target, sensitivity, cuts[low], policy)
        if all(kind in prices.tensors[name].types for name, kind in plan.types.items()):
            plans.append(plan)
    return min(plans, key=lambda plan: plan_cost(prices, plan.types).value, default=None)


def further_plans(bench: Bench, bits: Sequence[float]) -> list[tuple[Plan, PriceTable]]:
    """Uniform plans, and budget plans of so many bits a weight, with the prices that predict them."""
    weights = sum(tensor.weights for tensor in bench.target.tensors.values())
    uniform = [(uniform_plan(bench.target, name), bench.nearest) for name in bench.types]
    sizes = {f"{number}bpw": int(number * weights / 8) for number in bits}
    budgets = [bench.at_bytes(size, bench.compensated, name) for name, size in sizes.items()]
    bench.build_together(budgets)
    return uniform + [(plan, bench.compensated) for plan in budgets]


def prediction_points(bench: Bench, priced: Sequence[tuple[Plan, PriceTable]]) -> list[dict]:
    """Predicted and measured KL of each distinct plan."""
    distinct = {(plan.rounding, *sorted(plan.types.items())): (plan, prices) for plan, prices in priced}
    return [
        {
            "name": plan.name,
            "predicted": plan_cost(prices, plan.types).value,
            "measured": float(bench.measure(plan)["kld"].mean()),
        }
        for plan, prices in distinct.values()
    ]


def rank_correlation(points: Sequence[dict]) -> float:
    """Spearman's, of predicted and measured KL."""
    predicted, measured = (pd.Series([point[key] for point in points]) for key in ("predicted", "measured"))
    return float(predicted.rank().corr(measured.rank()))


def other_seed(arguments: argparse.Namespace, first_plans: dict[str, Plan], seed: int) -> dict[str, object]:
    """Another seed's plans by mixture: mean KLD, and the share of tensors of another type than in the first seed's plan."""
    other, row = open_bench(arguments, seed=seed), {"seed": seed}
    for mixture, plan in plans_of(other).items():
        changed = sum(first_plans[mixture].types[name] != kind for name, kind in plan.types.items()) / len(plan.types)
        kld = float(other.measure(plan)["kld"].mean())
        row[mixture] = {"kld": kld, "changed_tensors": changed}
        print(f"seed {seed} {mixture}: mean KLD {kld:.6f}, {changed:.0%} of the tensors have another type", flush=True)
    return row


def seed_spread(first: dict[str, float], others: Sequence[dict]) -> dict[str, float]:
    """Mixture -> largest mean KLD of all seeds over the smallest, minus 1; empty without other seeds."""
    spread = {}
    for mixture, kld in first.items() if others else ():
        klds = [kld, *(row[mixture]["kld"] for row in others)]
        spread[mixture] = max(klds) / min(klds) - 1
        print(f"{len(klds)} seeds {mixture}: mean KLD within {spread[mixture]:.1%} of each other")
    return spread


def identities(bench: Bench) -> dict[str, list[str]]:
    """Mixture -> the digest of the plan at its bytes, and the SHA-256 of that plan's GGUF."""
    return {mixture: [plan.digest(), bench.sha256(plan)] for mixture, plan in plans_of(bench).items()}


def judge(rows: Sequence[dict], spearman: float, plans: int) -> dict[str, bool]:
    """Claim -> whether it holds, of one run."""
    verdicts = {
        f"{row['mixture']}: at least {LEAST_REDUCTION[row['mixture']]:.0%} lower": (
            row["reduction"] >= LEAST_REDUCTION[row["mixture"]]
        )
        for row in rows
    }
    return verdicts | {
        "99.9 % KLD not higher anywhere": all(row["p999_samq"] <= row["p999_stock"] for row in rows),
        "lower than the threshold method at every size": all(
            row["kld_threshold"] is None or row["kld_samq"] < row["kld_threshold"] for row in rows
        ),
        f"rank correlation at least {LEAST_SPEARMAN} over at least {LEAST_PLANS} plans": (
            spearman >= LEAST_SPEARMAN and plans >= LEAST_PLANS
        ),
    }


def judge_repeats(
    spread: dict[str, float], first: dict[str, list[str]], repeats: Sequence[dict[str, list[str]]]
) -> dict[str, bool]:
    """Claim -> whether it holds, of several runs; a claim without runs is absent."""
    verdicts = {}
    if spread:
        verdicts[f"seeds within {MOST_SPREAD:.0%} of each other"] = max(spread.values()) <= MOST_SPREAD
    if repeats:
        verdicts["one seed, one plan, the same bytes"] = all(repeat == first for repeat in repeats)
    return verdicts


def show(row: dict) -> None:
    """Print one mixture's line."""
    threshold = f"{row['kld_threshold']:.6f}" if row["kld_threshold"] is not None else "none fits"
    print(
        f"{row['mixture']:7} {row['bytes']:>13,} B  KLD {row['kld_stock']:.6f} -> {row['kld_samq']:.6f} "
        f"({-row['reduction']:+.1%}, 95 % {-row['ci_high']:+.1%} .. {-row['ci_low']:+.1%}; "
        f"nearest {row['kld_samq_nearest'] / row['kld_stock'] - 1:+.1%})  "
        f"p99.9 {row['p999_stock']:.4f} -> {row['p999_samq']:.4f}  threshold {threshold}  predicted {row['predicted']:.6f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
