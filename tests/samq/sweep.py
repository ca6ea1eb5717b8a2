"""A small sweep as records: what the tests of reports, figures, tracking and the registry start from."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from samq.formats import tensor_bytes
from samq.gguf_file import file_sha256
from samq.records import (
    CalibrationSet,
    Evaluation,
    Metric,
    ModelSource,
    Plan,
    QuantizedModel,
    SensitivityMap,
    Substitution,
    TensorSensitivity,
    TextSet,
    Toolchain,
)
from samq.selection import Failure, Result

SHAPES = {
    "attn_q": (576, 576),
    "attn_k": (192, 576),
    "attn_v": (192, 576),
    "attn_output": (576, 576),
    "ffn_gate": (1536, 576),
    "ffn_up": (1536, 576),
    "ffn_down": (576, 1536),
}


@dataclass(frozen=True)
class Sweep:
    source: ModelSource
    calibration: CalibrationSet
    heldout: TextSet
    toolchain: Toolchain
    sensitivity: SensitivityMap
    results: list[Result]
    failures: list[Failure]

    def result(self, name: str) -> Result:
        return next(result for result in self.results if result.name == name)


def make_sweep(folder: Path, *, layers: int = 4, thresholds: tuple[float, ...] = (0.4, 0.2)) -> Sweep:
    """Full precision, Q4_K_M and one candidate a threshold, with figures that rise and fall as real ones do."""
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
        samples=32,
        tokens=5000,
        loss_nats=1.7,
        tied_embeddings=True,
        tensors={
            name: TensorSensitivity(
                shape=shapes[name], gradient_norm=score, gradient_norm_stderr=score / 10, score=score / top
            )
            for name, score in scores.items()
        },
    )
    scores = {name: tensor.score for name, tensor in sensitivity.tensors.items()}
    kept = {f"threshold-{cut:g}": {name for name in shapes if scores[name] > cut} for cut in thresholds}
    names = {"F16": set(shapes), **kept, "Q4_K_M": set()}
    results = [_result(folder, name, lifted, shapes, random) for name, lifted in names.items()]
    return Sweep(
        source=ModelSource(
            name="SmolLM2-135M-Instruct", revision="1" * 40, weights_digest="c" * 64, tokenizer_digest="d" * 64
        ),
        calibration=CalibrationSet(
            dataset="humaneval", samples=32, sequence_tokens=256, tokens=5000, seed=0, tokens_digest="e" * 64
        ),
        heldout=TextSet(dataset="humaneval", texts=("def f():", "def g():")),
        toolchain=Toolchain(version="0.3.36", build="0123456789ab", bin_folder=folder),
        sensitivity=sensitivity,
        results=results,
        failures=[
            Failure(name="threshold-0.9", stage="quantize", reason="llama-quantize ended with\ncode 1 | see log")
        ],
    )


def _result(
    folder: Path, name: str, lifted: set[str], shapes: dict[str, tuple[int, ...]], random: np.random.Generator
) -> Result:
    policy = "full" if name == "F16" else "stock" if name == "Q4_K_M" else "threshold"
    kind = "F16" if policy == "full" else "Q8_0"
    types = {tensor: kind if tensor in lifted else "Q5_0" for tensor in shapes}
    size = sum(tensor_bytes(types[tensor], shape) for tensor, shape in shapes.items())
    weights = sum(rows * length for rows, length in shapes.values())
    parameters = {"threshold": float(name.removeprefix("threshold-"))} if policy == "threshold" else {}
    if parameters:
        parameters |= {"keep": "Q8_0", "base": "Q4_K_M", "grouping": "block", "quantile": None}
        parameters |= {"kept_tensors": len(lifted), "kept_groups": min(len(lifted), 3)}
    plan = Plan(
        name=name,
        policy=policy,
        parameters=parameters,
        types=types,
        substitutions={
            tensor: Substitution(requested="Q4_K", used="Q5_0", reason="rows of 576 do not allow Q4_K")
            for tensor, used in types.items()
            if used == "Q5_0"
        },
        tensor_bytes=size,
        weights=weights,
        gguf_sha256="f" * 64,
    )
    place = folder / name
    place.mkdir()
    gguf = place / "model.gguf"
    gguf.write_bytes(b"GGUF " + name.encode())
    model = QuantizedModel(
        name=name,
        file=gguf.name,
        sha256=file_sha256(gguf),
        file_bytes=size + 1_800_000,
        tensor_bytes=size,
        bits_per_weight=plan.bits_per_weight,
        plan_digest=plan.digest(),
        types=types,
        metadata={"samq.plan": plan.digest()},
    )
    kld = 0.0 if policy == "full" else 0.06 * (1 - len(lifted) / len(shapes)) + 0.002
    evaluation = Evaluation(name=name, sha256=model.sha256, metrics=_metrics(kld, model.file_bytes, random))
    evaluation = evaluation.model_copy(update={"missing": {"memory/measured_vram_bytes": "no NVIDIA GPU"}})
    evaluation.save(place / "evaluation.json")
    pd.DataFrame({"kld": random.exponential(kld or 1e-9, 8)}).to_parquet(place / "tokens.parquet")
    (place / "evaluate.log").write_text("a log that names this machine's paths")
    return Result(plan=plan, model=model, evaluation=evaluation, gguf=gguf, folder=place)


def _metrics(kld: float, size: int, random: np.random.Generator) -> dict[str, Metric]:
    n = 4080
    jitter = float(random.normal(0, 0.3))
    return {
        "fidelity/mean_kld_nats": Metric(value=kld, stderr=0.03 * kld, n=n),
        "fidelity/kld_p99_nats": Metric(value=9 * kld, n=n),
        "fidelity/perplexity": Metric(value=4.1 * (1 + kld), stderr=0.1, n=n),
        "fidelity/perplexity_ratio": Metric(value=1 + 0.8 * kld, stderr=0.05 * kld, n=n),
        "fidelity/same_top_percent": Metric(value=100 - 150 * kld, stderr=0.4, n=n),
        "json/valid_percent": Metric(value=90 - 100 * kld, n=40),
        "json/valid_low_percent": Metric(value=76 - 100 * kld),
        "json/valid_high_percent": Metric(value=96 - 100 * kld),
        "speed/latency_p99_ms": Metric(value=420 + size / 1e6 + 10 * jitter, n=10),
        "speed/time_to_first_token_ms": Metric(value=120 + 3 * jitter, n=10),
        "speed/generation_tokens_per_s": Metric(value=9000 / (size / 1e6 + 60) + jitter, stderr=0.5, n=10),
        "memory/file_bytes": Metric(value=size),
        "memory/predicted_vram_bytes": Metric(value=size + 150e6),
    }
