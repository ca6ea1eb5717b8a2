"""Versions of a registered model as a night leaves them: real small GGUFs, tracked and registered, with figures of choice."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from samq.allocation.target import OpenTarget, full_plan, stock_plan
from samq.gguf.audit import as_is
from samq.gguf.file import file_sha256
from samq.llamacpp.quantize import quantize
from samq.promotion.policy import AccuracyPolicy, JsonPolicy, PromotionPolicy
from samq.records import Toolchain
from samq.sweep.selection import Result, SelectionRule
from samq.sweep.sweep import Sweep
from samq.tracking.sweep_runs import track_sweep
from samq.tracking.tracked import TrackingSettings
from tests.conftest import write_tiny_gguf
from tests.samq.sweeps import make_sweep

NAME = "llama"
PROMPTS = 400
PROVENANCE = ("plan", "policy", "version", "model", "model_sha256", "calibration", "llama_cpp")
POLICY = PromotionPolicy(
    accuracy=AccuracyPolicy(benchmarks=("arc/acc",), margin=0.05),
    json_answers=JsonPolicy(margin=0.05),
    max_mean_kld_nats=0.5,
    max_predicted_vram_bytes=10**9,
    max_latency_p99_ms=10_000,
    audit=True,
    provenance=PROVENANCE,
)


def answers(valid: int, first: int = 0) -> pd.DataFrame:
    """The table of JSON answers, so many of them valid; prompts are numbered from `first`."""
    return pd.DataFrame(
        {"id": [f"prompt-{first + number}" for number in range(PROMPTS)], "valid": np.arange(PROMPTS) < valid}
    )


def benchmark_items(right: int) -> pd.DataFrame:
    """The table of a benchmark's items, so many of them right."""
    return pd.DataFrame(
        {
            **{"benchmark": "arc", "task": "arc", "item": range(PROMPTS)},
            "document": [f"hash-{number}" for number in range(PROMPTS)],
            **{"metric": "acc", "value": (np.arange(PROMPTS) < right).astype(float), "higher_is_better": True},
            "answer": "[-1.0, -2.0]",
        }
    )


def night(
    sweep: Sweep,
    target: OpenTarget,
    folder: Path,
    mixture: str,
    *,
    valid: int = 300,
    right: int = 300,
    first: int = 0,
) -> list[Result]:
    """Full precision, which answers 300 prompts and items rightly, and a mixture of which that is given."""
    folder.mkdir()
    full = full_plan(target)
    baseline = replace(
        sweep.result("F16"),
        plan=full,
        gguf=target.full.path,
        model=as_is(target.full.path, file_sha256(target.full.path), full),
    )
    plan = stock_plan(target, mixture)
    provenance = {key: f"{folder.name} {key}" for key in PROVENANCE[2:]}
    model = quantize(target.full.path, plan, folder, target.toolchain, provenance=provenance)
    quantized = replace(sweep.result("Q4_K_M"), plan=plan, gguf=folder / model.file, model=model)
    return [
        measured(baseline, folder / "full", valid=300, right=300, first=first),
        measured(quantized, folder / "quantized", valid=valid, right=right, first=first),
    ]


def measured(result: Result, folder: Path, *, valid: int, right: int, first: int) -> Result:
    """A result with the evaluation of its own GGUF, and tables of items, in a folder of its own."""
    folder.mkdir()
    evaluation = result.evaluation.model_copy(update={"name": result.name, "sha256": result.model.sha256})
    evaluation.save(folder / "evaluation.json")
    answers(valid, first).to_parquet(folder / "json.parquet")
    benchmark_items(right).to_parquet(folder / "benchmarks.parquet")
    return replace(result, evaluation=evaluation, folder=folder, predicted=None)


def register_night(uri: str, sweep: Sweep, results: list[Result]) -> str:
    """Track a night and register its quantized candidate; returns the version."""
    settings = TrackingSettings(tracking_uri=uri, experiment="nights", run_name="nightly", registered_model=NAME)
    rule = SelectionRule(reference=results[-1].name)
    tracked = track_sweep(settings, replace(sweep, results=tuple(results), failures=(), rule=rule), "# Report\n")
    assert tracked.model_version
    return tracked.model_version


def three_nights(folder: Path, database: Path, toolchain: Toolchain) -> None:
    """Versions 1 and 2 answer as well as full precision does, and 3, which is the candidate, does not."""
    (folder / "sweep").mkdir()
    sweep = make_sweep(folder / "sweep", layers=1, thresholds=(), stock=("Q4_K_M",), budgets=())
    target = OpenTarget.open(write_tiny_gguf(folder / "tiny.gguf", blocks=1), toolchain)
    for number, (mixture, valid) in enumerate((("Q4_K_M", 300), ("Q5_K_M", 300), ("Q6_K", 200)), 1):
        results = night(sweep, target, folder / f"night-{number}", mixture, valid=valid)
        assert register_night(f"sqlite:///{database}", sweep, results) == str(number)
