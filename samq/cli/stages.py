"""The flow's stages as commands run them: outside a flow run they are plain functions, with the flow's store and keys.

Each function imports its stages only when called: they need torch, transformers or llama.cpp.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from samq.cli.start import loading_packages
from samq.errors import SamqError
from samq.progress import bar

if TYPE_CHECKING:
    from pathlib import Path

    from samq.cli.text import CalibrationText
    from samq.evaluation.settings import EvaluationSettings
    from samq.records import ModelSource, Plan, PriceTable, TextSet
    from samq.store import Artifact
    from samq.workspace import Workspace
    from tasks.calibrate import Passes
    from tasks.model import TorchModel
    from tasks.target import Target
    from tasks.text import FirstSequences


def workspace(device: str = "auto", memory_limit: str | None = None) -> "Workspace":
    """The store of the SAMQ folder and the installed llama.cpp."""
    from samq.allocation.budget_notation import read_size
    from samq.workspace import Workspace

    return Workspace.here(device=device, memory_limit=read_size(memory_limit) if memory_limit else None)


def convert(at: "Workspace", source: "ModelSource") -> "Artifact":
    """The full-precision GGUF."""
    with loading_packages():
        from tasks.convert import convert as stage

    return stage(at, source, "F16")


def convert_mmproj(at: "Workspace", source: "ModelSource") -> "Path | None":
    """The vision or audio part of a multimodal model; None if it has none, or if the converter fails on it."""
    with loading_packages():
        from tasks.mmproj import convert_mmproj as stage

    return stage(at, source, "F16")


def tokenize(at: "Workspace", full: "Artifact", text: "CalibrationText", sequence_tokens: int) -> "FirstSequences":
    """The sequences of calibration text that are used; raises SamqError if there are too few."""
    with loading_packages():
        from samq.files import CALIBRATION_SET_NAME
        from samq.records import CalibrationSet
        from tasks.text import FirstSequences
        from tasks.text import tokenize as stage

    tokens = stage(at, full, text.text, text.seed, sequence_tokens, text.packing)
    available = CalibrationSet.load(tokens.path(CALIBRATION_SET_NAME)).samples
    count = text.sequences or available
    if text.exact and available < count:
        raise SamqError(
            f"{text.text.dataset} has {available} sequences of {sequence_tokens} tokens, too few for {count}; ask for "
            "fewer or shorter ones"
        )
    return FirstSequences(tokens, min(available, count))


def calibrate(at: "Workspace", model: "TorchModel", sequences: "FirstSequences", passes: "Passes") -> "Artifact":
    """The sensitivity map and the Fisher information."""
    from tasks.agreement import agreement
    from tasks.calibrate import calibrate as stage

    agreement(at, model, sequences.tokens)
    return stage(at, model, sequences, None, passes)


def measure_imatrix(at: "Workspace", full: "Artifact", text: "TextSet", sequence_tokens: int) -> "Artifact":
    """The importance matrix."""
    with loading_packages():
        from tasks.imatrix import imatrix as stage

    return stage(at, full, text, sequence_tokens)


def plan_budget(
    at: "Workspace", target: "Target", sensitivity: "Artifact", budget: str, types: list[str] | None, unmeasured: str
) -> "tuple[Plan, PriceTable]":
    """The plan of a budget, and the prices that it was chosen by.

    The prices stay in the store; `types` may be chosen (None: the default types).
    """
    with loading_packages():
        from samq.allocation.budget import BudgetPolicy
        from samq.allocation.types import DEFAULT_TYPES
        from tasks.plan import load_plan
        from tasks.plan import plan_budget as stage
        from tasks.price import choose_types, load_prices, price

    with bar("choose types"):
        wanted = choose_types(at, target, types or DEFAULT_TYPES)
    prices = price(at, target, wanted, sensitivity, unmeasured)
    with bar(f"plan {budget}"), _silenced("samq.plan"):  # the command prints its warning, also for a stored plan
        plan = load_plan(stage(at, target, prices, budget, BudgetPolicy()))
    return plan, load_prices(prices)


@contextmanager
def _silenced(logger: str) -> Iterator[None]:
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def compensate(
    at: "Workspace", model: "TorchModel", sequences: "FirstSequences", batch_size: int, quantized: "Artifact"
) -> "Artifact":
    """A quantized GGUF with compensated rounding."""
    with loading_packages():
        from flows.parameters import GRAM_TOKENS
        from tasks.agreement import agreement
        from tasks.compensate import compensate_file
        from tasks.layer_inputs import InputText

    agreement(at, model, sequences.tokens)
    text = InputText(sequences.tokens, sequences.count, GRAM_TOKENS, batch_size)
    return compensate_file(at, model, text, quantized)


def evaluate(
    at: "Workspace",
    name: str,
    candidate: "Artifact",
    full: "Artifact",
    text: "TextSet",
    settings: "EvaluationSettings",
) -> "Artifact":
    """The evaluation of a candidate against full precision on held-out text."""
    with loading_packages():
        from tasks.evaluate import baseline
        from tasks.evaluate import evaluate as stage
        from tasks.text import heldout

    tokens = heldout(at, full, text)
    return stage(at, name, candidate, tokens, baseline(at, full, tokens, settings), settings)
