"""The stages as commands run them: without Prefect's server, with the flow's store and keys.

Each function imports its stages only when called: they need torch, transformers or llama.cpp.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from samq.cli.options import Dtype, Labels
from samq.cli.start import loading_packages
from samq.errors import SamqError
from samq.home import store_folder
from samq.progress import bar

if TYPE_CHECKING:
    from samq.cli.text import CalibrationText
    from samq.evaluation.settings import EvaluationSettings
    from samq.records import ModelSource, Plan, PriceTable, TextSet
    from samq.store import Artifact

TIMEOUT_S = 6 * 3600.0


def convert(source: "ModelSource") -> "Artifact":
    """The full-precision GGUF."""
    with loading_packages():
        from samq.llamacpp.toolchain import converter_build, find_toolchain
        from tasks.convert import convert as stage

    toolchain = find_toolchain()
    return stage.fn(store_folder(), source, toolchain, converter_build(toolchain), "F16", TIMEOUT_S)


def tokenize(full: "Artifact", text: "CalibrationText", sequence_tokens: int) -> "tuple[Artifact, int]":
    """The tokens of calibration text, and how many of its sequences to use; raises SamqError if there are too few."""
    with loading_packages():
        from samq.records import CalibrationSet
        from tasks.text import SET_NAME
        from tasks.text import tokenize as stage

    tokens = stage.fn(store_folder(), full, text.text, text.seed, sequence_tokens, text.packing)
    available = CalibrationSet.load(tokens.path(SET_NAME)).samples
    count = text.sequences or available
    if text.exact and available < count:
        raise SamqError(
            f"{text.text.dataset} has {available} sequences of {sequence_tokens} tokens, too few for {count}; ask for "
            "fewer or shorter ones"
        )
    return tokens, min(available, count)


def calibrate(
    source: "ModelSource",
    full: "Artifact",
    tokens: "tuple[Artifact, int]",
    batch_size: int,
    dtype: Dtype,
    device: str,
    labels: Labels,
    seed: int,
) -> "Artifact":
    """The sensitivity map and the Fisher information; `tokens` are those of `tokenize`."""
    with loading_packages():
        from tasks.calibrate import calibrate as stage

    return stage.fn(store_folder(), source, full, *tokens, None, batch_size, dtype, device, labels, seed)


def measure_imatrix(full: "Artifact", text: "TextSet", sequence_tokens: int) -> "Artifact":
    """The importance matrix."""
    with loading_packages():
        from samq.llamacpp.toolchain import find_toolchain
        from tasks.imatrix import imatrix as stage

    return stage.fn(store_folder(), full, text, sequence_tokens, find_toolchain(), TIMEOUT_S)


def plan_budget(
    full: "Artifact", imatrix: "Artifact | None", sensitivity: "Artifact", budget: str, types: list[str] | None
) -> "tuple[Plan, PriceTable]":
    """The plan of a budget, and the prices that it was chosen by.

    The ladder of quantized types and its prices stay in the store; `types` may be chosen (None: the default types).
    """
    with loading_packages():
        from samq.allocation.budget import BudgetPolicy
        from samq.allocation.ladder import DEFAULT_TYPES
        from samq.llamacpp.toolchain import find_toolchain
        from tasks.ladder import choose_rungs, rung
        from tasks.plan import load_plan
        from tasks.plan import plan_budget as stage
        from tasks.price import load_prices, price

    store, toolchain = store_folder(), find_toolchain()
    with bar("choose the ladder's types"):
        names = choose_rungs.fn(full, imatrix, types or DEFAULT_TYPES, [], toolchain)
    rungs = {name: rung.fn(store, name, full, imatrix, toolchain, TIMEOUT_S) for name in names}
    prices = price.fn(store, full, rungs, sensitivity, imatrix, toolchain)
    with bar(f"plan {budget}"), _silenced("samq.plan"):  # the command prints its warning, also for a stored plan
        plan = load_plan(stage.fn(store, full, imatrix, prices, budget, BudgetPolicy(), toolchain))
    return plan, load_prices(prices)


@contextmanager
def _silenced(logger: str) -> Iterator[None]:
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def measure_gram(
    source: "ModelSource",
    full: "Artifact",
    tokens: "tuple[Artifact, int]",
    batch_size: int,
    dtype: Dtype,
    device: str,
) -> "Artifact":
    """The Gram matrices of the layers' inputs; `tokens` are those of `tokenize`."""
    with loading_packages():
        from samq.sensitivity.gram import GRAM_TOKENS
        from tasks.compensate import gram

    return gram.fn(store_folder(), source, full, *tokens, GRAM_TOKENS, batch_size, dtype, device)


def evaluate(
    name: str, candidate: "Artifact", full: "Artifact", text: "TextSet", settings: "EvaluationSettings"
) -> "Artifact":
    """The evaluation of a candidate against full precision on held-out text."""
    with loading_packages():
        from tasks.evaluate import baseline
        from tasks.evaluate import evaluate as stage
        from tasks.text import heldout

    store = store_folder()
    tokens = heldout.fn(store, full, text)
    logits = baseline.fn(store, full, tokens, settings, TIMEOUT_S)
    return stage.fn(store, name, candidate, tokens, logits, settings, TIMEOUT_S)
