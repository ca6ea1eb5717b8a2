"""What the benchmarks of quality share: one model prepared, calibrated and priced by the flow's own phases, and plans measured.

Everything is kept in the store under --work, as a run of the flow keeps it, and used again while its inputs are the same.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from flows.costs import Costs, measure_costs
from flows.gather import Gather
from flows.ggufs import build
from flows.inputs import Inputs, prepare
from flows.parameters import CalibrationParameters, CandidateParameters, ModelParameters, RequantizeParameters
from samq.allocation.budget import Budget, BudgetPolicy, budget_plan
from samq.allocation.target import OpenTarget
from samq.allocation.types import DEFAULT_TYPES
from samq.data.datasets import DatasetSpec
from samq.data.tokens import TokenBatch
from samq.evaluation.baseline import cut_chunks, read_tokens
from samq.evaluation.settings import EvaluationSettings
from samq.files import DIVERGENCE_NAME, GGUF_NAME, HELDOUT_NAME, PLAN_NAME, TOKENS_NAME
from samq.llamacpp.runtime import Model
from samq.llamacpp.toolchain import find_toolchain
from samq.records import Plan, PriceTable
from samq.store import Artifact, Store
from samq.workspace import Workspace
from tasks.evaluate import evaluate
from tasks.price import choose_types


@dataclass(frozen=True)
class Bench:
    """A model whose tensors have prices, and the held-out text that plans are measured on."""

    at: Workspace
    parameters: RequantizeParameters
    inputs: Inputs
    types: list[str]  # that tensors are priced in
    costs: Costs
    _built: dict[str, Artifact] = field(default_factory=dict)  # digest of a plan -> its GGUF

    @cached_property
    def target(self) -> OpenTarget:
        """What plans are made for."""
        return self.inputs.target.open(self.at.toolchain)

    @property
    def nearest(self) -> PriceTable:
        """Prices of weights rounded to the nearest values."""
        return self.costs.tables["nearest"]

    @property
    def compensated(self) -> PriceTable:
        """Prices of compensated rounding."""
        return self.costs.tables["compensated"]

    @property
    def tokens(self) -> TokenBatch:
        """The sequences that were calibrated on."""
        batch = TokenBatch.load(self.inputs.tokens.path(TOKENS_NAME))
        return batch.part(0, self.costs.sensitivity.samples)

    @cached_property
    def chunks(self) -> NDArray[np.int32]:
        """The held-out tokens that are scored, (chunks, tokens)."""
        settings, tokens = self.parameters.evaluation, read_tokens(self.inputs.heldout.path(HELDOUT_NAME))
        with Model(self.target.full.path, allocate=False) as model:
            bos = model.bos if model.adds_bos else None
        return cut_chunks(tokens, settings.context_tokens, bos)[: settings.chunks]

    @property
    def heldout_tokens(self) -> int:
        """How many held-out tokens are scored."""
        return len(self.chunks) * self.parameters.evaluation.scored_per_chunk

    def at_bytes(self, tensor_bytes: int, prices: PriceTable, name: str) -> Plan:
        """The plan of least predicted KL with no more bytes of tensors."""
        return budget_plan(self.target, prices, Budget(name, tensor_bytes), BudgetPolicy())

    def build(self, plan: Plan) -> Artifact:
        """The plan's GGUF."""
        if plan.digest() not in self._built:
            self.build_together([plan])
        return self._built[plan.digest()]

    def build_together(self, plans: Sequence[Plan]) -> None:
        """Build the GGUFs of plans, which have different names; the model goes through once to compensate them all."""
        gather, published = Gather(), {plan.name: self._publish(plan) for plan in plans}
        ggufs = build(self.at, self.inputs, published, self.costs, gather)
        if gather.failures:
            raise SystemExit(f"{gather.failures[0].name} failed: {gather.failures[0].reason}")
        self._built.update({plan.digest(): ggufs[plan.name] for plan in plans})

    def measure(self, plan: Plan) -> pd.DataFrame:
        """The scored held-out tokens of the plan's GGUF: a row for each, with its chunk and its kld."""
        gguf = self.build(plan)
        measured = evaluate(
            self.at, plan.name, gguf, self.inputs.heldout, self.inputs.baseline, self.parameters.evaluation
        )
        return pd.read_parquet(measured.path(DIVERGENCE_NAME))

    def sha256(self, plan: Plan) -> str:
        """SHA-256 of the plan's GGUF."""
        return self.build(plan).files[GGUF_NAME].sha256

    def _publish(self, plan: Plan) -> Artifact:
        """The plan as an artifact of the stage `plan`."""
        return keep(self.at.store, "plan", plan.digest(), lambda folder: plan.save(folder / PLAN_NAME))


def keep(root: Path, stage: str, key: str, write: Callable[[Path], object]) -> Artifact:
    """What `write` puts into a folder, as the artifact of this key; written only if the store lacks it."""
    store = Store(root)
    if store.find(stage, key) is None:
        with store.publish(stage, key) as folder:
            write(folder)
    artifact = store.find(stage, key)
    assert artifact is not None, "just published"
    return artifact


def open_bench(
    arguments: argparse.Namespace,
    *,
    seed: int | None = None,
    types: Sequence[str] | None = None,
    store: Path | None = None,
) -> Bench:
    """Prepare, calibrate and price by the flow's phases; another seed, types or store than the arguments' if given."""
    at = Workspace(store or arguments.work.absolute() / "store", find_toolchain())
    parameters = parameters_of(arguments, arguments.seed if seed is None else seed, types or arguments.types)
    inputs = prepare(at, parameters)
    chosen = choose_types(at, inputs.target, parameters.candidates.ladder)
    return Bench(at, parameters, inputs, chosen, measure_costs(at, inputs, chosen, parameters))


def again(arguments: argparse.Namespace, number: int) -> Bench:
    """The bench once more from nothing, in a store of its own."""
    return open_bench(arguments, store=arguments.work.absolute() / f"repeat-{number}")


def parameters_of(arguments: argparse.Namespace, seed: int, types: Sequence[str]) -> RequantizeParameters:
    """The arguments as a run of the flow would have them; all --samples sequences are measured at once."""
    calibration = CalibrationParameters(
        dataset=DatasetSpec(name=str(arguments.calibration), seed=seed),
        sequence_tokens=arguments.sequence_tokens,
        packing=True,
        batch_size=4,
        first_sequences=arguments.samples,
        precision=1e9,
        check_sequences=0,
        seed=seed,
    )
    return RequantizeParameters(
        name="quality",
        model=ModelParameters(source=str(arguments.gguf), hf_folder=hf_folder(arguments)),
        calibration=calibration,
        heldout=DatasetSpec(name=str(arguments.heldout)),
        candidates=CandidateParameters(stock=("Q4_K_M",), ladder=tuple(types)),
        evaluation=EvaluationSettings(chunks=arguments.chunks, json_prompts=0, speed_requests=0),
    )


def hf_folder(arguments: argparse.Namespace) -> Path | None:
    """Where the configuration and the tokenizer come from; None: the GGUF."""
    folder = arguments.folder or arguments.gguf.parent
    return folder if (folder / "config.json").is_file() else None


def parser(description: str) -> argparse.ArgumentParser:
    """The command line that these benchmarks share."""
    model = Path("../shared/models/code-46m")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, default=model / "model-f16.gguf", help="the full-precision model")
    parser.add_argument("--folder", type=Path, help="HF folder with the tokenizer; default: the GGUF's, if it has one")
    parser.add_argument("--calibration", type=Path, default=model / "train_sample.txt", help="text to calibrate on")
    parser.add_argument("--heldout", type=Path, default=model / "valid.txt", help="text to measure on")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--work", type=Path, default=Path(".samq/quality"), help="folder that keeps everything heavy")
    parser.add_argument("--types", nargs="+", default=list(DEFAULT_TYPES), help="types that budgets choose from")
    parser.add_argument("--samples", type=int, default=192, help="calibration sequences")
    parser.add_argument("--sequence-tokens", type=int, default=256, help="longest sequence")
    parser.add_argument(
        "--chunks", type=int, default=64, help="held-out chunks of 512 tokens; the second half is scored"
    )
    parser.add_argument("--seed", type=int, default=0, help="order of the sequences, and labels drawn on them")
    return parser
