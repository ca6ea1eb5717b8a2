"""Claim: Fisher information as means over rows and over columns predicts and allocates as well as that of single weights.

E[g^2] of every weight is measured once and averaged to coarser grains. These are blocks of a row, whole rows, rows by columns
(the product's grain), whole tensors. The script reports for each grain:

- its size in storage;
- the rank correlation (Spearman) of predicted and measured KL over uniform plans, stock mixtures, and the budget plans of all
  grains;
- the budget plan at the bytes of each mixture.

Of each budget plan it reports:

- its predicted KL;
- the finest grain's prediction for it, relative to that for the finest grain's own plan;
- the share of tensors of another type than in that plan;
- mean KLD on held-out text, with the paired change against the plan of the product's grain.

Weights are rounded to the nearest value, so that plans differ by allocation alone. Takes the arguments of quality.py
(--samples and --chunks make it short) except --bits, --seeds and --repeats, and shares its --work folder.
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from bench import Bench, keep, open_bench, parser
from gguf import GGMLQuantizationType
from safetensors.numpy import load_file, save_file
from setting import machine, versions

from samq.allocation.prices import plan_cost
from samq.allocation.target import stock_plan
from samq.allocation.types import legal_types, uniform_plan
from samq.gguf.file import TensorInfo
from samq.gguf.ggml import to_float
from samq.gguf.nearest import NearestRounding
from samq.progress import bar
from samq.records import Plan, PriceTable, digest_of
from samq.sensitivity.backpropagation import backpropagate
from samq.sensitivity.loss import Labelling
from samq.sensitivity.reduction import Reduced
from samq.sensitivity.weight_gradients import Gradients
from samq.sweep.comparison import compare

MIXTURES = ("Q4_K_M", "Q3_K_M")
GRAINS = ("1", "8", "32", "256", "row", "row x column", "tensor")  # a number: so many weights of a row
DEFAULT = "row x column"  # samq.sensitivity.fisher


def main() -> None:
    """Measure, print the table and write it as JSON."""
    arguments = parser(__doc__ or "").parse_args()
    bench = open_bench(arguments)
    target = bench.target
    sensitivity = bench.costs.sensitivity
    tables = price(bench, single_weights(arguments, bench))

    stocks = {mixture: stock_plan(target, mixture) for mixture in MIXTURES}
    plans = {
        (grain, mixture): bench.at_bytes(stocks[mixture].tensor_bytes, table, f"size-of:{mixture}")
        for grain, table in tables.items()
        for mixture in MIXTURES
    }
    shared = [*stocks.values(), *(uniform_plan(target, name) for name in bench.types), *plans.values()]
    distinct = list({tuple(plan.types.items()): plan for plan in shared}.values())
    measured = pd.Series([float(bench.measure(plan)["kld"].mean()) for plan in distinct])
    rows = []
    for grain, table in tables.items():
        predicted = pd.Series([plan_cost(table, plan.types).value for plan in distinct])
        row = {
            "grain": grain,
            "fisher_bytes": sum(stored_bytes(tensor, grain) for tensor in target.quantizable.values()),
            "spearman": float(predicted.rank().corr(measured.rank())),
            "lowest_ratio": float((measured / predicted).min()),  # measured over predicted
            "highest_ratio": float((measured / predicted).max()),
            "mixtures": {
                mixture: at_mixture(bench, tables[GRAINS[0]], plans, grain, mixture, arguments.seed)
                for mixture in MIXTURES
            },
        }
        rows.append(row)
        show(row)
    if arguments.json:
        result = {
            "grains": rows,
            "stock": {mixture: float(bench.measure(plan)["kld"].mean()) for mixture, plan in stocks.items()},
            "plans": len(distinct),
            "model_bytes": target.full.path.stat().st_size,
            "seed": arguments.seed,
            "calibration_sequences": sensitivity.samples,
            "calibration_tokens": sensitivity.tokens,
            "heldout_tokens": bench.heldout_tokens,
            "versions": versions(),
            "machine": machine(),
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def single_weights(arguments: argparse.Namespace, bench: Bench) -> dict[str, np.ndarray]:
    """Fisher of every weight, (rows, row length), on the sequences and labels that the bench was calibrated with."""
    target, tokens = bench.target, bench.tokens

    def measure(folder: Path) -> None:
        model, layout = bench.inputs.model.load_with_layout(bench.at)
        sums = [torch.zeros(math.prod(weight.shape[:-1]), weight.shape[-1]) for weight in layout.weights]

        def add(index: int, gradients: Gradients) -> Reduced:
            for _, rows, gradient in gradients.bands():
                sums[index][rows] += gradient.square_()
            return Reduced(gradients.zeros(1))

        with bar("fisher of single weights") as progress:
            backpropagate(
                model,
                tokens,
                layout.weights,
                add,
                labelling=Labelling("model", arguments.seed),
                batch_size=4,
                progress=progress,
            )
        scale = 1 / float((tokens.lengths.astype(np.int64) - 1).sum())
        fisher = {
            weight.name: part.numpy() * np.float32(scale) for weight, part in zip(layout.weights, sums, strict=True)
        }
        save_file(fisher, folder / "single-weights.safetensors")

    key = digest_of([target.full.sha256, tokens.digest(), arguments.seed])
    kept = keep(bench.at.store, "single_weights", key, measure)
    return load_file(kept.path("single-weights.safetensors"))


def price(bench: Bench, singles: Mapping[str, np.ndarray]) -> dict[str, PriceTable]:
    """Grain -> price table; rounds once for all grains except the product's."""
    target, product = bench.target, bench.nearest
    costs: dict[str, dict[tuple[str, str], float]] = {grain: {} for grain in GRAINS if grain != DEFAULT}
    rounding = NearestRounding(target.full.path, target.imatrix.path if target.imatrix else None)
    for name, kinds in legal_types(target, bench.types).items():
        averages = {grain: averaged(singles[name], grain) for grain in costs}
        weights = rounding.weights(name, slice(None))
        for kind in kinds:
            rounded = to_float(GGMLQuantizationType[kind], rounding.blocks(name, kind, slice(None)), weights.shape[1])
            squares = np.square(rounded - weights, dtype=np.float64)
            for grain, average in averages.items():
                costs[grain][name, kind] = float(np.vdot(average, squares)) / 2
    return {grain: with_costs(product, costs[grain]) if grain in costs else product for grain in GRAINS}


def with_costs(prices: PriceTable, costs: Mapping[tuple[str, str], float]) -> PriceTable:
    """The table with other costs in nats, by (tensor, type); a type without a new cost keeps its own, which is 0."""
    tensors = {
        name: tensor.model_copy(
            update={
                "types": {
                    kind: price.model_copy(update={"kl_nats": costs.get((name, kind), price.kl_nats)})
                    for kind, price in tensor.types.items()
                }
            }
        )
        for name, tensor in prices.tensors.items()
    }
    return prices.model_copy(update={"tensors": tensors})


def averaged(weights: np.ndarray, grain: str) -> np.ndarray:
    """Fisher of single weights, (rows, row length), averaged to a grain; each weight gets its average, in float64."""
    if grain == "tensor":
        return np.full(weights.shape, weights.mean(dtype=np.float64))
    size = weights.shape[1] if grain == "row" else int(grain)
    starts = np.arange(0, weights.shape[1], size)
    sizes = np.diff([*starts, weights.shape[1]])
    return np.repeat(np.add.reduceat(weights, starts, axis=1, dtype=np.float64) / sizes, sizes, axis=1)


def stored_bytes(tensor: TensorInfo, grain: str) -> int:
    """Bytes of a tensor's Fisher information in float32."""
    rows = tensor.weights // tensor.row_length
    match grain:
        case "tensor":
            return 4
        case "row":
            return 4 * rows
        case "row x column":
            return 4 * (rows + tensor.row_length)
        case _:
            return 4 * rows * -(-tensor.row_length // int(grain))


def at_mixture(
    bench: Bench,
    finest: PriceTable,
    plans: Mapping[tuple[str, str], Plan],
    grain: str,
    mixture: str,
    seed: int,
) -> dict[str, float]:
    """The plan of a grain at a mixture's bytes, compared with the plans of the finest and the default grain."""
    plan, best, default = (plans[other, mixture] for other in (grain, GRAINS[0], DEFAULT))
    scored = bench.measure(plan)
    paired = compare(plan.name, scored, default.name, bench.measure(default), seed=seed)
    assert plan.predicted_kl_nats is not None
    return {
        "bytes": plan.tensor_bytes,
        "predicted": plan.predicted_kl_nats,
        "loss_by_finest": plan_cost(finest, plan.types).value / plan_cost(finest, best.types).value - 1,
        "changed_tensors": sum(best.types[name] != kind for name, kind in plan.types.items()) / len(plan.types),
        "kld": float(scored["kld"].mean()),
        "change": 0.0 - paired.reduction,  # no -0.0
        "change_low": 0.0 - paired.high,
        "change_high": 0.0 - paired.low,
    }


def show(row: dict) -> None:
    """Print one grain's lines."""
    print(
        f"grain {row['grain']:12} {row['fisher_bytes'] / 1e6:9.3f} MB  rank correlation {row['spearman']:.4f}  measured "
        f"{row['lowest_ratio']:.2f} to {row['highest_ratio']:.2f} times predicted"
    )
    for mixture, at in row["mixtures"].items():
        print(
            f"  {mixture:7} predicted {at['predicted']:.6f}  by the finest {at['loss_by_finest']:+.2%}  "
            f"{at['changed_tensors']:4.0%} of the tensors changed  KLD {at['kld']:.6f} ({at['change']:+.1%}, 95 % "
            f"{at['change_low']:+.1%} .. {at['change_high']:+.1%})",
            flush=True,
        )


if __name__ == "__main__":
    main()
