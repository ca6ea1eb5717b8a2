"""A small sweep as records: what the tests of reports, figures, tracking and the registry start from."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from samq.allocation.knapsack import solve
from samq.evaluation.divergence import summarize_divergence
from samq.files import DIVERGENCE_NAME
from samq.gguf.file import file_sha256
from samq.gguf.formats import bits_per_weight, tensor_bytes
from samq.records import (
    CalibrationSet,
    Evaluation,
    Metric,
    ModelSource,
    Plan,
    PredictionCheck,
    Price,
    QuantizedModel,
    SensitivityMap,
    Substitution,
    TensorSensitivity,
    TextSet,
    Toolchain,
)
from samq.sweep.comparison import compare_sweep
from samq.sweep.selection import Failure, Result
from samq.sweep.sweep import MadeFrom, Sweep

SHAPES = {
    "attn_q": (576, 576),
    "attn_k": (192, 576),
    "attn_v": (192, 576),
    "attn_output": (576, 576),
    "ffn_gate": (1536, 576),
    "ffn_up": (1536, 576),
    "ffn_down": (576, 1536),
}
STOCK = {"Q3_K_M": ("Q3_K", "Q4_0"), "Q4_K_M": ("Q4_K", "Q5_0"), "Q5_K_M": ("Q5_K", "Q5_1")}  # asked for, got
LADDER = ("Q4_0", "Q5_0", "Q5_1", "Q8_0", "F16")
CHUNKS, SCORED = 12, 64  # held-out chunks, scored tokens of each


def check_of(sweep: Sweep, name: str) -> PredictionCheck:
    """A check of a budget plan's prediction that finds what the price table said."""
    result = sweep.result(name)
    assert result and result.predicted
    predicted, error = result.predicted.value, result.predicted.stderr
    return PredictionCheck(
        plan=name,
        plan_digest=result.plan.digest(),
        samples=32,
        tokens=5000,
        predicted=Metric(value=predicted, stderr=error),
        additive=Metric(value=1.03 * predicted, stderr=error),
        by_tensor=Metric(value=1.06 * predicted, stderr=0.06 * predicted),
        joint=Metric(value=1.2 * predicted, stderr=0.15 * predicted),
    )


def with_results(sweep: Sweep, results: Iterable[Result]) -> Sweep:
    """The sweep with other results; comparisons stay as they are, also those of candidates that it no longer has."""
    return replace(sweep, results=tuple(results))


def items_of(accuracy, count=200):
    """Rows of a benchmark of which a share is right: the same first ones for everybody."""
    return pd.DataFrame(
        {
            "benchmark": "samq_gsm8k",
            "task": "samq_gsm8k",
            "item": range(count),
            "document": [str(item) for item in range(count)],
            "metric": "exact_match",
            "value": (np.arange(count) < accuracy * count).astype(float),
            "higher_is_better": True,
            "answer": "",
        }
    )


def make_sweep(
    folder: Path,
    *,
    layers: int = 4,
    thresholds: tuple[float, ...] = (0.4, 0.2),
    stock: tuple[str, ...] = ("Q4_K_M", "Q5_K_M"),
    budgets: tuple[str, ...] = ("size-of:Q4_K_M", "size-of:Q5_K_M"),
    worst_nats: float = 0.06,
) -> Sweep:
    """Full precision, stock mixtures and a candidate for each threshold and budget, with figures as real ones are.

    `worst_nats` is the KL that the whole model in Q5_0 is predicted to have. A budget is `size-of:` a stock mixture or
    bits per weight (`6.5bpw`).
    """
    random = np.random.default_rng(0)
    shapes = {"token_embd.weight": (49152, 576)}
    shapes |= {f"blk.{layer}.{kind}.weight": shape for layer in range(layers) for kind, shape in SHAPES.items()}
    scores = {name: float(score) for name, score in zip(shapes, random.lognormal(-2.5, 0.8, len(shapes)), strict=True)}
    scores["token_embd.weight"] = top = max(scores.values()) * 1.5
    sensitivity = SensitivityMap(
        model_digest="a" * 64,
        calibration_digest="b" * 64,
        labels="text",
        seed=0,
        sequence_tokens=(2500, 2500),
        loss_nats=1.7,
        tied_embeddings=True,
        tensors={
            name: TensorSensitivity(
                shape=shapes[name],
                gradient_norm=score,
                gradient_norm_stderr=score / 10,
                score=score / top,
                sequence_squares=(1.0, 2.0),
            )
            for name, score in scores.items()
        },
    )
    options = _options(shapes, scores, worst_nats)
    plans = [_plan("F16", "full", {}, dict.fromkeys(shapes, "F16"), shapes)]
    plans += [_threshold_plan(cut, sensitivity, shapes) for cut in thresholds]
    plans += [_stock_plan(mixture, shapes) for mixture in stock]
    plans += [_budget_plan(text, options, shapes) for text in budgets]
    results = tuple(_result(folder, plan, options, random) for plan in plans)
    return Sweep(
        made_from=MadeFrom(
            source=ModelSource(
                name="SmolLM2-135M-Instruct", revision="1" * 40, weights_digest="c" * 64, tokenizer_digest="d" * 64
            ),
            calibration=CalibrationSet(
                dataset="humaneval", samples=32, sequence_tokens=256, tokens=5000, seed=0, tokens_digest="e" * 64
            ),
            heldout=TextSet(dataset="humaneval", texts=("def f():", "def g():")),
            toolchain=Toolchain(version="0.3.36", build="0123456789ab", bin_folder=folder),
        ),
        sensitivity=sensitivity,
        results=results,
        failures=(
            Failure(name="threshold-0.9", stage="quantize", reason="llama-quantize ended with\ncode 1 | see log"),
        ),
        comparisons=tuple(compare_sweep(results)),
    )


def _options(
    shapes: Mapping[str, tuple[int, ...]], scores: Mapping[str, float], worst_nats: float
) -> dict[str, dict[str, Price]]:
    """Every tensor's prices: each bit less costs four times the KL, times the tensor's score."""

    def costs(kind: str) -> dict[str, float]:
        return {name: score * 4.0 ** -bits_per_weight(kind) * (kind != "F16") for name, score in scores.items()}

    scale = worst_nats / sum(costs("Q5_0").values())
    return {
        name: {kind: Price(bytes=tensor_bytes(kind, shape), kl_nats=scale * costs(kind)[name]) for kind in LADDER}
        for name, shape in shapes.items()
    }


def _plan(
    name: str,
    policy: Any,
    parameters: dict[str, Any],
    types: dict[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    **others: Any,
) -> Plan:
    return Plan(
        name=name,
        policy=policy,
        parameters=parameters,
        types=types,
        tensor_bytes=sum(tensor_bytes(types[tensor], shape) for tensor, shape in shapes.items()),
        weights=sum(rows * length for rows, length in shapes.values()),
        gguf_sha256="f" * 64,
        **others,
    )


def _stock_plan(mixture: str, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    requested, used = STOCK[mixture]
    substitution = Substitution(requested=requested, used=used, reason=f"rows of 576 do not allow {requested}")
    types = dict.fromkeys(shapes, used)
    substitutions = dict.fromkeys(shapes, substitution)
    return _plan(mixture, "stock", {"mixture": mixture}, types, shapes, substitutions=substitutions, mixture=mixture)


def _threshold_plan(cut: float, sensitivity: SensitivityMap, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    base = _stock_plan("Q4_K_M", shapes)
    kept = {name for name in shapes if sensitivity.tensors[name].score > cut}
    parameters = {"threshold": cut, "keep": "Q8_0", "base": "Q4_K_M", "grouping": "block", "quantile": None}
    parameters |= {"kept_tensors": len(kept), "kept_groups": min(len(kept), 3)}
    types = {name: "Q8_0" if name in kept else kind for name, kind in base.types.items()}
    substitutions = {name: one for name, one in base.substitutions.items() if name not in kept}
    return _plan(f"threshold-{cut:g}", "threshold", parameters, types, shapes, substitutions=substitutions)


def _budget_plan(text: str, options: Mapping[str, Mapping[str, Price]], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    if text.endswith("bpw"):
        limit = int(float(text.removesuffix("bpw")) * sum(rows * length for rows, length in shapes.values()) / 8)
    else:
        limit = _stock_plan(text.removeprefix("size-of:"), shapes).tensor_bytes
    solution = solve(options, limit)
    guards = {"output_guard": None, "embedding_guard": None, "least_type": None, "expert_guard": None}
    predicted = _predicted(solution.types, options)
    return _plan(
        f"budget-{text.replace(':', '-')}",
        "budget",
        {"budget": text, "budget_bytes": limit, **guards},
        solution.types,
        shapes,
        predicted_kl_nats=predicted.value,
        predicted_kl_stderr=predicted.stderr,
        solver_gap=solution.gap,
    )


def _predicted(types: Mapping[str, str], options: Mapping[str, Mapping[str, Price]]) -> Metric:
    cost = sum(options[name][kind].kl_nats for name, kind in types.items())
    return Metric(value=cost, stderr=0.04 * cost)


def _result(
    folder: Path, plan: Plan, options: Mapping[str, Mapping[str, Price]], random: np.random.Generator
) -> Result:
    place = folder / plan.name
    place.mkdir()
    gguf = place / "model.gguf"
    gguf.write_bytes(b"GGUF " + plan.name.encode())
    model = QuantizedModel(
        name=plan.name,
        file=gguf.name,
        sha256=file_sha256(gguf),
        file_bytes=plan.tensor_bytes + 1_800_000,
        tensor_bytes=plan.tensor_bytes,
        bits_per_weight=plan.bits_per_weight,
        plan_digest=plan.digest(),
        types=plan.types,
        metadata={"samq.plan": plan.digest()},
    )
    predicted = _predicted(plan.types, options)
    kld = predicted.value * float(random.uniform(0.95, 1.2)) * (1 + 2 * predicted.value)
    scored = _scored(kld, random)
    scored.to_parquet(place / DIVERGENCE_NAME)
    metrics = summarize_divergence(scored) | _other_metrics(kld, model.file_bytes, random)
    evaluation = Evaluation(
        name=plan.name, sha256=model.sha256, metrics=metrics, missing={"memory/measured_vram_bytes": "no NVIDIA GPU"}
    )
    evaluation.save(place / "evaluation.json")
    (place / "evaluate.log").write_text("a log that names this machine's paths")
    return Result(plan=plan, model=model, evaluation=evaluation, gguf=gguf, folder=place, predicted=predicted)


def _scored(kld: float, random: np.random.Generator) -> pd.DataFrame:
    """Scored tokens of mean KLD `kld`: what makes a token hard is the same for every candidate, the rest is its own."""
    text = np.random.default_rng(1)
    chunk = np.repeat(np.arange(CHUNKS, dtype=np.int32), SCORED)
    hard = text.lognormal(0, 0.3, CHUNKS)[chunk] * text.gamma(0.5, 2, len(chunk))
    token, nll_base, top = text.integers(0, 49152, len(chunk)), text.gamma(1, 1.7, len(chunk)), text.random(len(chunk))
    own = hard * random.lognormal(0, 0.4, len(chunk))
    values = kld * own / own.mean()
    nll = nll_base + random.normal(0, 1, len(chunk)) * np.sqrt(2 * values)
    return pd.DataFrame(
        {
            "chunk": chunk,
            "position": np.tile(np.arange(512 - SCORED, 512, dtype=np.int32), CHUNKS),
            "token": token.astype(np.int32),
            "kld": values,
            "nll": nll,
            "nll_base": nll_base,
            "delta_p": np.exp(-nll) - np.exp(-nll_base),
            "same_top": top > 1.5 * kld,
        }
    )


def _other_metrics(kld: float, size: int, random: np.random.Generator) -> dict[str, Metric]:
    jitter = float(random.normal(0, 0.3))
    return {
        "json/valid_percent": Metric(value=90 - 100 * kld, n=40),
        "json/valid_low_percent": Metric(value=76 - 100 * kld),
        "json/valid_high_percent": Metric(value=96 - 100 * kld),
        "speed/latency_p99_ms": Metric(value=420 + size / 1e6 + 10 * jitter, n=10),
        "speed/time_to_first_token_ms": Metric(value=120 + 3 * jitter, n=10),
        "speed/generation_tokens_per_s": Metric(value=9000 / (size / 1e6 + 60) + jitter, stderr=0.5, n=10),
        "memory/file_bytes": Metric(value=size),
        "memory/predicted_vram_bytes": Metric(value=size + 150e6),
    }
