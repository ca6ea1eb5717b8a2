"""Stages: calibration and held-out text, and the tokens they become."""

from dataclasses import dataclass
from pathlib import Path

from samq.data.datasets import DatasetSpec, load_texts
from samq.data.tokens import TokenBatch
from samq.data.tokens import tokenize as cut_into_sequences
from samq.files import CALIBRATION_SET_NAME, GGUF_NAME, HELDOUT_NAME, TOKENS_NAME
from samq.llamacpp.runtime import Model
from samq.progress import bar
from samq.records import CalibrationSet, TextSet
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.stage import RETRY_DELAYS_S, stage, step


@dataclass(frozen=True)
class FirstSequences:
    """The first `count` sequences in an artifact of `tokenize`."""

    tokens: Artifact
    count: int


@dataclass(frozen=True)
class LastSequences:
    """The `last` sequences in an artifact of `tokenize`: those that calibration leaves for checks."""

    tokens: Artifact
    last: int


@step("load text", run_name="load text {spec.name}", retries=len(RETRY_DELAYS_S))
def load_text(spec: DatasetSpec) -> TextSet:
    """Read a dataset. Not cached: only reading it tells whether it changed."""
    with bar(f"read {spec.name}"):
        return TextSet(dataset=spec.name, texts=tuple(load_texts(spec)))


@stage("tokenize", version=3, run_name="tokenize {texts.dataset}", packages=("llama-cpp-python",))
def tokenize(
    at: Workspace,
    folder: Path,
    full: Artifact,
    texts: TextSet,
    seed: int,
    sequence_tokens: int,
    packing: bool,
) -> None:
    """`tokens.npz` and `calibration-set.json`: the sequences that gradients are taken on, by the GGUF's own tokenizer.

    The set has no name in it: the same text may be called otherwise the next time (`load_calibration_set`).
    """
    with bar(f"tokenize {texts.dataset}"), Model(full.path(GGUF_NAME), allocate=False) as model:
        calibration_set, tokens = cut_into_sequences(
            texts.texts,
            lambda text: model.tokenize(text, add_special=True).tolist(),
            bos=model.bos if model.adds_bos else None,
            spec=DatasetSpec(name=texts.dataset, seed=seed),
            sequence_tokens=sequence_tokens,
            packing=packing,
        )
    tokens.save(folder / TOKENS_NAME)
    calibration_set.model_copy(update={"dataset": ""}).save(folder / CALIBRATION_SET_NAME)


def load_calibration_set(tokens: Artifact, spec: DatasetSpec) -> CalibrationSet:
    """The calibration set in an artifact of `tokenize`, as the data set is called now."""
    named = {"dataset": spec.name, "split": spec.split, "fields": spec.fields}
    return CalibrationSet.load(tokens.path(CALIBRATION_SET_NAME)).model_copy(update=named)


@stage("heldout", version=1, run_name="tokenize held-out {texts.dataset}", packages=("llama-cpp-python",))
def heldout(at: Workspace, folder: Path, full: Artifact, texts: TextSet) -> None:
    """`heldout.npz`: the held-out text's token ids, by the GGUF's own tokenizer, concatenated."""
    with bar(f"tokenize {texts.dataset}"), Model(full.path(GGUF_NAME), allocate=False) as model:
        ids = model.tokenize("\n\n".join(texts.texts))
    TokenBatch.of([ids.tolist()]).save(folder / HELDOUT_NAME)
