"""Claim: at the bytes of llama-quantize's mixtures, with the same importance matrix, SAMQ's plans are closer to F16.

For each mixture: the mixture itself, the plan of least predicted KL with no more bytes, rounded to the nearest values and
with compensated rounding, and the best threshold plan with no more bytes, each assembled from one ladder and compared with
the F16 model on held-out text. `samq` in the JSON is the compensated plan, `samq_nearest` what allocation alone reaches.
Uniform plans are measured too, so that the rank correlation of predicted and measured KL is over all families.
Everything heavy is kept in --work and used again when its inputs have not changed.

In the JSON, `reduction` is 1 - kld_samq / kld_stock, and `ci_low` and `ci_high` are its 95 % interval, paired by token.

The plans are made again from --seeds other seeds. `seeds` in the JSON has a row for each: by mixture, the mean KLD (`kld`)
and the share of tensors of another type than in the first seed's plan (`changed_tensors`). `seed_spread` is, by mixture, the
largest mean KLD over the smallest, less 1, over all seeds, the first included: the claim is at most 0.03. The seed chooses
the sequences and labels of the gradients; Gram matrices and importance matrix are of the same text whatever it is. Then
everything is calibrated --repeats times more with the first seed: the plans and the bytes must be the first run's.
`verdicts` says of every claim whether it holds; exits 1 if one does not. Both options at 0 make the run short.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from setting import conclude, versions
from transformers import PreTrainedModel

from samq.allocation.budget import Budget, BudgetPolicy, budget_plan
from samq.allocation.ladder import DEFAULT_TYPES, Ladder, make_rung, rung_names, uniform_plan
from samq.allocation.prices import plan_cost, price_table
from samq.allocation.threshold import Target, ThresholdPolicy, change_points, stock_plan, threshold_plan
from samq.data.datasets import DatasetSpec, load_texts
from samq.data.tokens import TokenBatch, tokenize
from samq.evaluation.baseline import cut_chunks, write_baseline
from samq.evaluation.divergence import measure_divergence
from samq.evaluation.settings import EvaluationSettings
from samq.gguf.file import file_sha256, gguf_names, read_metadata
from samq.llamacpp.programs import GGUF_NAME, IMATRIX_NAME, measure_imatrix
from samq.llamacpp.runtime import Model
from samq.llamacpp.toolchain import find_toolchain
from samq.progress import bar
from samq.quantization import compensation
from samq.quantization.assembly import write_assembled
from samq.quantization.compensation import compensate, compensated_prices
from samq.records import CalibrationSet, Plan, PriceTable, SensitivityMap, digest_of
from samq.sensitivity.backpropagation import Labelling
from samq.sensitivity.fisher import Fisher, load_fisher, save_fisher
from samq.sensitivity.gram import GramMatrices, measure_gram
from samq.sensitivity.hf_model import describe_source, load_model
from samq.sensitivity.layout import GgufLayout, row_orders, weights_of
from samq.sensitivity.measure import Origin, measure_sensitivity
from samq.store import Artifact, Store
from samq.sweep.comparison import compare

LEAST_REDUCTION = {"Q3_K_M": 0.35, "Q4_K_S": 0.35, "Q4_K_M": 0.35, "Q5_K_M": 0.2, "Q6_K": 0.12}
MIXTURES = tuple(LEAST_REDUCTION)
LEAST_SPEARMAN, LEAST_PLANS, MOST_SPREAD = 0.97, 20, 0.03
BASES = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M")


@dataclass(frozen=True)
class Bench:
    """What every plan is made from and measured with."""

    target: Target
    ladder: Ladder
    grams: Path | None  # none: only nearest rounding is measured
    chunks: np.ndarray
    baseline: Path
    settings: EvaluationSettings
    work: Path

    def measure(self, plan: Plan) -> pd.DataFrame:
        """The scored held-out tokens of the plan's GGUF: a row for each, with its chunk and its kld."""
        key = digest_of(
            [plan.types, self.target.sha256, plan.imatrix_sha256, str(self.baseline), *self._rounding(plan)]
        )
        kept = self.work / "measured" / f"{key}.parquet"
        if not kept.is_file():
            kept.parent.mkdir(exist_ok=True)
            gguf = self.write(plan)
            with Model(gguf) as model, bar(f"measure {plan.name}") as progress:
                _, scored = measure_divergence(model, self.chunks, self.baseline, self.settings, progress)
            whole = kept.with_suffix(".partial")
            scored.to_parquet(whole)
            os.replace(whole, kept)  # what a killed run leaves has another name
            gguf.unlink()
        return pd.read_parquet(kept)

    def write(self, plan: Plan) -> Path:
        """The plan's GGUF, in the work folder until the next one."""
        gguf, nearest = self.work / "candidate.gguf", self.work / "nearest.gguf"
        if plan.rounding == "nearest":
            write_assembled(self.ladder, plan, gguf, {"samq.plan": plan.digest()})
        else:
            assert self.grams is not None
            write_assembled(self.ladder, plan, nearest, {"samq.plan": plan.digest()})
            compensate(self.target.gguf, nearest, GramMatrices(self.grams), gguf)
            nearest.unlink()
        return gguf

    def _rounding(self, plan: Plan) -> list[str]:
        """What its bytes depend on beside the plan's types."""
        if plan.rounding == "nearest":
            return []
        assert self.grams is not None
        return [plan.rounding, file_sha256(self.grams), file_sha256(Path(compensation.__file__))]


def main() -> None:
    """Make what is missing, measure, print the table and write it as JSON."""
    arguments = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    store = Store(arguments.work / "store")
    target, matrix = open_target(arguments, store)
    names = rung_names(target.quantizable.values(), arguments.types, imatrix=True)
    ladder = make_ladder(store, target, matrix, names)
    grams = measure_grams(arguments, store, target)
    sensitivity, nearest, prices = price(arguments, store, target, ladder, grams, arguments.seed)
    bench = open_bench(arguments, store, target, ladder, grams)

    rows, klds = [], {}
    compared: list[tuple[Plan, PriceTable]] = []
    for mixture in MIXTURES:
        stock = stock_plan(target, mixture)
        budget = Budget(f"size-of:{mixture}", stock.tensor_bytes)
        plan, allocated = (budget_plan(target, table, budget, BudgetPolicy()) for table in (prices, nearest))
        founding = best_threshold_plan(target, sensitivity, nearest, stock.tensor_bytes)
        scored = {name: bench.measure(p) for name, p in (("stock", stock), ("samq", plan), ("samq_nearest", allocated))}
        kld = {name: float(table["kld"].mean()) for name, table in scored.items()}
        paired = compare(plan.name, scored["samq"], mixture, scored["stock"], seed=arguments.seed)
        p999 = {name: float(table["kld"].quantile(0.999)) for name, table in scored.items()}
        kld_threshold = float(bench.measure(founding)["kld"].mean()) if founding else None
        rows.append(
            {
                "mixture": mixture,
                "bytes": stock.tensor_bytes,
                "kld_stock": kld["stock"],
                "kld_samq": kld["samq"],
                "kld_samq_nearest": kld["samq_nearest"],
                "reduction": paired.reduction,
                "ci_low": paired.low,
                "ci_high": paired.high,
                "kld_threshold": kld_threshold,
                "p999_stock": p999["stock"],
                "p999_samq": p999["samq"],
                "predicted": plan.predicted_kl_nats,
            }
        )
        klds[mixture] = kld["samq"]
        tables = {"nearest": nearest, "compensated": prices}
        compared += [(p, tables[p.rounding]) for p in (stock, plan, allocated, founding) if p]
        show(rows[-1])
    compared += [(uniform_plan(target, name), nearest) for name in ladder.rungs]
    for bits in arguments.bits:
        weights = sum(tensor.weights for tensor in target.tensors.values())
        plan = budget_plan(target, prices, Budget(f"{bits}bpw", int(bits * weights / 8)), BudgetPolicy())
        compared.append((plan, prices))
    distinct = {(plan.rounding, *sorted(plan.types.items())): (plan, table) for plan, table in compared}
    points = [
        {
            "name": p.name,
            "predicted": plan_cost(table, p.types).value,
            "measured": float(bench.measure(p)["kld"].mean()),
        }
        for p, table in distinct.values()
    ]
    predicted, measured = (pd.Series([point[figure] for point in points]) for figure in ("predicted", "measured"))
    spearman = float(predicted.rank().corr(measured.rank()))
    print(f"rank correlation of predicted and measured KL over {len(points)} plans: {spearman:.4f}")
    others = [seed for seed in range(arguments.seeds + 1) if seed != arguments.seed][: arguments.seeds]
    seeds = [other_seed(arguments, store, bench, prices, seed) for seed in others]
    spread = seed_spread(klds, seeds)
    first = made_at(bench, prices) if arguments.repeats else {}
    repeats = [again(arguments, store, bench, number) for number in range(1, arguments.repeats + 1)]
    verdicts = judge(rows, spearman, len(points), spread, first, repeats)
    result = {
        "mixtures": rows,
        "spearman": spearman,
        "gram_tokens": gram_tokens(arguments)[1],
        "plans": points,
        "seeds": seeds,
        "seed_spread": spread,
        "repeats": repeats,
        "calibration_tokens": sensitivity.tokens,
        "heldout_tokens": len(bench.chunks) * bench.settings.scored_per_chunk,
    }
    conclude(result, verdicts, arguments.json)


def judge(
    rows: Sequence[dict],
    spearman: float,
    plans: int,
    spread: dict[str, float],
    first: dict[str, list[str]],
    repeats: Sequence[dict[str, list[str]]],
) -> dict[str, bool]:
    """Claim -> whether it holds; those that were not measured are absent."""
    verdicts = {
        f"{row['mixture']}: at least {LEAST_REDUCTION[row['mixture']]:.0%} lower": (
            row["reduction"] >= LEAST_REDUCTION[row["mixture"]]
        )
        for row in rows
    }
    verdicts |= {
        "99.9 % KLD not higher anywhere": all(row["p999_samq"] <= row["p999_stock"] for row in rows),
        "lower than the threshold method at every size": all(
            row["kld_threshold"] is None or row["kld_samq"] < row["kld_threshold"] for row in rows
        ),
        f"rank correlation at least {LEAST_SPEARMAN} over at least {LEAST_PLANS} plans": (
            spearman >= LEAST_SPEARMAN and plans >= LEAST_PLANS
        ),
    }
    if spread:
        verdicts[f"seeds within {MOST_SPREAD:.0%} of each other"] = max(spread.values()) <= MOST_SPREAD
    if repeats:
        verdicts["one seed, one plan, the same bytes"] = all(repeat == first for repeat in repeats)
    return verdicts


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    model = Path("../shared/models/code-46m")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, default=model / "model-f16.gguf")
    parser.add_argument("--calibration", type=Path, default=model / "train_sample.txt")
    parser.add_argument("--heldout", type=Path, default=model / "valid.txt")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="HF folder with the tokenizer; default: the GGUF's, if it has one")
    parser.add_argument("--work", type=Path, default=Path(".samq/quality"), help="what is kept between runs")
    parser.add_argument("--types", nargs="+", default=list(DEFAULT_TYPES), help="the ladder's rungs")
    parser.add_argument("--bits", nargs="*", type=float, default=[3.6, 4.0, 4.3, 5.2, 6.0], help="further budgets")
    parser.add_argument("--samples", type=int, default=192, help="calibration sequences")
    parser.add_argument("--sequence-tokens", type=int, default=256)
    parser.add_argument("--imatrix-characters", type=int, default=250_000, help="calibration text for llama-imatrix")
    parser.add_argument("--chunks", type=int, default=64, help="held-out chunks of 512 tokens, the second half scored")
    parser.add_argument("--seed", type=int, default=0, help="which sequences, and the labels drawn on them")
    parser.add_argument("--seeds", type=int, default=5, help="other seeds to compare with")
    parser.add_argument(
        "--repeats", type=int, default=4, help="further runs with the same seed, which must give the same bytes"
    )
    return parser.parse_args()


def hf_folder(arguments: argparse.Namespace) -> Path | None:
    """Where the configuration and the tokenizer come from; None: the GGUF."""
    folder = arguments.folder or arguments.gguf.parent
    return folder if (folder / "config.json").is_file() else None


def stage(store: Store, name: str, key: Sequence[str | int], make: Callable[[Path], object]) -> Artifact:
    """The artifact of a stage, made if the store does not have it."""
    digest = digest_of([name, *key])
    if (found := store.find(name, digest)) is None:
        print(f"{name} ...", flush=True)
        with store.publish(name, digest) as folder:
            make(folder)
        found = store.find(name, digest)
        assert found is not None
    return found


def open_target(arguments: argparse.Namespace, store: Store) -> tuple[Target, Artifact]:
    """The GGUF that is planned for, and the importance matrix of the calibration text."""
    toolchain, sha256 = find_toolchain(), file_sha256(arguments.gguf)
    text = arguments.calibration.read_text()[: arguments.imatrix_characters]
    matrix = stage(
        store,
        "imatrix",
        [sha256, text, toolchain.digest()],
        lambda folder: measure_imatrix(arguments.gguf, text, folder, toolchain),
    )
    return Target.open(arguments.gguf, toolchain, matrix.path(IMATRIX_NAME), sha256), matrix


def make_ladder(store: Store, target: Target, matrix: Artifact, names: Sequence[str]) -> Ladder:
    """The ladder of these rungs."""
    rungs = {}
    for name in names:
        key = [target.sha256, matrix.digest(), name, target.toolchain.digest()]
        rungs[name] = stage(store, "rung", key, partial(rung, target, name)).path(GGUF_NAME)
    return Ladder(target.gguf, rungs)


def rung(target: Target, name: str, folder: Path) -> None:
    """One rung of the ladder."""
    make_rung(target, name, folder, provenance={})


def gram_tokens(arguments: argparse.Namespace) -> tuple[TokenBatch, int]:
    """The importance matrix's text in sequences, and how many tokens they have."""
    text = arguments.calibration.read_text()[: arguments.imatrix_characters]
    made, tokens = sequences(arguments, [text], DatasetSpec(name="imatrix"))
    return tokens, made.tokens


def open_calibration(
    arguments: argparse.Namespace, target: Target, seed: int
) -> tuple[PreTrainedModel, Callable[[str], str | None], CalibrationSet, TokenBatch]:
    """The model, its parameters' names in GGUF, the calibration text, and its sequences in the seed's order."""
    model, _ = load_model(describe_source(arguments.gguf, hf_folder=hf_folder(arguments)))
    spec = DatasetSpec(name=str(arguments.calibration), seed=seed)
    calibration, tokens = sequences(arguments, load_texts(spec), spec)
    return model, gguf_names(read_metadata(target.gguf)), calibration, tokens.part(0, arguments.samples)


def sequences(
    arguments: argparse.Namespace, texts: Sequence[str], spec: DatasetSpec
) -> tuple[CalibrationSet, TokenBatch]:
    """Texts cut into sequences of the GGUF's own tokens."""
    with Model(arguments.gguf, allocate=False) as model:
        return tokenize(
            texts,
            lambda text: model.tokenize(text, add_special=True).tolist(),
            bos=model.bos if model.adds_bos else None,
            spec=spec,
            sequence_tokens=arguments.sequence_tokens,
            packing=True,
        )


def measure_grams(arguments: argparse.Namespace, store: Store, target: Target, repeat: int = 0) -> Path:
    """Gram matrices of the importance matrix's text; each `repeat` is measured anew."""
    tokens, _ = gram_tokens(arguments)

    def measure(folder: Path) -> None:
        model, _ = load_model(describe_source(arguments.gguf, hf_folder=hf_folder(arguments)))
        names = gguf_names(read_metadata(arguments.gguf))
        with bar("gram") as progress:
            measure_gram(model, tokens, folder / "gram.safetensors", names=names, batch_size=4, progress=progress)

    key = [target.sha256, tokens.digest(), versions()["torch"], *([repeat] if repeat else [])]
    return stage(store, "gram", key, measure).path("gram.safetensors")


def price(
    arguments: argparse.Namespace, store: Store, target: Target, ladder: Ladder, grams: Path, seed: int, repeat: int = 0
) -> tuple[SensitivityMap, PriceTable, PriceTable]:
    """Sensitivities, and prices of nearest and of compensated rounding; see `calibrate`."""
    sensitivity, fisher = calibrate(arguments, store, target, seed, repeat)
    prices = price_table(ladder, target.quantizable, sensitivity, fisher, gguf_sha256=target.sha256)
    return sensitivity, prices, compensated_prices(prices, GramMatrices(grams))


def calibrate(
    arguments: argparse.Namespace, store: Store, target: Target, seed: int, repeat: int = 0
) -> tuple[SensitivityMap, dict[str, Fisher]]:
    """Sensitivities and fisher on random sequences of the calibration text, with labels drawn from the model.

    Each `repeat` is measured anew.
    """
    key: list[str | int] = [target.sha256, file_sha256(arguments.calibration), versions()["torch"]]
    key += [arguments.samples, arguments.sequence_tokens, seed, *([repeat] if repeat else [])]

    def measure(folder: Path) -> None:
        model, names, calibration, tokens = open_calibration(arguments, target, seed)
        with bar(f"calibrate, seed {seed}") as progress:
            sensitivity, fisher = measure_sensitivity(
                model,
                tokens,
                GgufLayout(names, row_orders(weights_of(model, names), arguments.gguf)),
                Origin(target.sha256, calibration.digest()),
                labelling=Labelling("model", seed),
                batch_size=4,
                progress=progress,
            )
        assert fisher is not None
        sensitivity.save(folder / "sensitivity-map.json")
        save_fisher(folder / "fisher.safetensors", fisher)

    made = stage(store, "calibrate", key, measure)
    return SensitivityMap.load(made.path("sensitivity-map.json")), load_fisher(made.path("fisher.safetensors"))


def open_bench(
    arguments: argparse.Namespace, store: Store, target: Target, ladder: Ladder, grams: Path | None = None
) -> Bench:
    """Cut the held-out text and compute the F16 model's logits on it."""
    settings = EvaluationSettings(chunks=arguments.chunks)
    with Model(arguments.gguf) as model:
        ids = model.tokenize(arguments.heldout.read_text())
        chunks = cut_chunks(ids, settings.context_tokens, model.bos if model.adds_bos else None)[: arguments.chunks]
        key: list[str | int] = [
            target.sha256,
            file_sha256(arguments.heldout),
            len(chunks),
            versions()["llama-cpp-python"],
        ]
        baseline = stage(
            store, "baseline", key, lambda folder: write_baseline(model, target.sha256, chunks, settings, folder)
        )
    return Bench(target, ladder, grams, chunks, baseline.folder, settings, arguments.work)


def best_threshold_plan(target: Target, sensitivity: SensitivityMap, prices: PriceTable, limit: int) -> Plan | None:
    """The threshold plan of least predicted KL within `limit` bytes, over bases; each base's threshold by bisection."""
    plans = []
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


def other_seed(
    arguments: argparse.Namespace, store: Store, bench: Bench, prices: PriceTable, seed: int
) -> dict[str, object]:
    """Another seed's plans, a mixture: their mean KLD, and the share of tensors of another type than the first seed's."""
    *_, others = price(arguments, store, bench.target, bench.ladder, bench.grams, seed)
    row: dict[str, object] = {"seed": seed}
    for mixture in MIXTURES:
        budget = Budget(f"size-of:{mixture}", stock_plan(bench.target, mixture).tensor_bytes)
        plan, first = (budget_plan(bench.target, table, budget, BudgetPolicy()) for table in (others, prices))
        changed = sum(first.types[name] != kind for name, kind in plan.types.items()) / len(plan.types)
        kld = float(bench.measure(plan)["kld"].mean())
        row[mixture] = {"kld": kld, "changed_tensors": changed}
        print(f"seed {seed} {mixture}: mean KLD {kld:.6f}, {changed:.0%} of the tensors have another type", flush=True)
    return row


def seed_spread(first: dict[str, float], others: Sequence[dict]) -> dict[str, float]:
    """Mixture -> largest mean KLD over the smallest, less 1, over the first seed and the others; empty without others."""
    spread = {}
    for mixture, kld in first.items() if others else ():
        klds = [kld, *(row[mixture]["kld"] for row in others)]
        spread[mixture] = max(klds) / min(klds) - 1
        print(f"{len(klds)} seeds {mixture}: mean KLD within {spread[mixture]:.1%} of each other")
    return spread


def again(arguments: argparse.Namespace, store: Store, bench: Bench, repeat: int) -> dict[str, list[str]]:
    """`made_at` of one more calibration with the same seed."""
    grams = measure_grams(arguments, store, bench.target, repeat)
    *_, prices = price(arguments, store, bench.target, bench.ladder, grams, arguments.seed, repeat)
    return made_at(replace(bench, grams=grams), prices)


def made_at(bench: Bench, prices: PriceTable) -> dict[str, list[str]]:
    """Mixture -> the digest of the plan at its bytes, and the SHA-256 of that plan's GGUF."""
    made = {}
    for mixture in MIXTURES:
        budget = Budget(f"size-of:{mixture}", stock_plan(bench.target, mixture).tensor_bytes)
        plan = budget_plan(bench.target, prices, budget, BudgetPolicy())
        gguf = bench.write(plan)
        made[mixture] = [plan.digest(), file_sha256(gguf)]
        gguf.unlink()
    return made


def show(row: dict) -> None:
    """Print one mixture's line."""
    founding = f"{row['kld_threshold']:.6f}" if row["kld_threshold"] is not None else "none fits"
    print(
        f"{row['mixture']:7} {row['bytes']:>13,} B  KLD {row['kld_stock']:.6f} -> {row['kld_samq']:.6f} "
        f"({-row['reduction']:+.1%}, 95 % {-row['ci_high']:+.1%} .. {-row['ci_low']:+.1%}; "
        f"nearest {row['kld_samq_nearest'] / row['kld_stock'] - 1:+.1%})  "
        f"p99.9 {row['p999_stock']:.4f} -> {row['p999_samq']:.4f}  threshold {founding}  predicted {row['predicted']:.6f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
