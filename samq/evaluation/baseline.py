"""The full-precision model's logits on held-out text, computed once and compared with every candidate.

Text is cut into chunks as `llama-perplexity --kl-divergence` cuts it (tools/perplexity/perplexity.cpp of llama.cpp). It is
tokenized whole and cut into pieces of the context length. Each starts with BOS if the model adds one. Only positions with
enough text before them are scored, by default the second half of a chunk.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar
from zipfile import BadZipFile

import numpy as np
from numpy.lib.format import write_array_header_2_0
from numpy.typing import NDArray
from pydantic import Field

from samq.errors import SamqError
from samq.evaluation.settings import EvaluationSettings
from samq.gguf.values import logits_not_finite
from samq.llamacpp.runtime import Model
from samq.progress import Progress, silent
from samq.records import Record

BASELINE_NAME = "baseline.json"
BASELINE_KV_TYPE = "F16"  # whatever the candidates' is


class Baseline(Record):
    """The full-precision model's logits on some chunks; they lie beside it in `logits.npy`."""

    SCHEMA: ClassVar[str] = "samq.baseline/1"

    gguf_sha256: str = Field(description="the model they are of")
    chunks_digest: str = Field(description="SHA-256 over the chunks' shape and token ids")
    first_scored: int = Field(description="first scored position of each chunk")
    shape: tuple[int, int] = Field(description="(scored positions of all chunks, vocabulary)")


def read_tokens(path: Path) -> NDArray[np.int32]:
    """The held-out token ids of a TokenBatch that samq.data.tokens saved, sequence after sequence.

    Read here because samq.data.tokens brings torch and transformers, which an evaluation has no use for.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            ids, lengths = content["ids"], content["lengths"]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise SamqError(f"cannot read held-out tokens from {path}: {error}; make the held-out set again") from error
    chosen: NDArray[np.int32] = ids[np.arange(ids.shape[1]) < lengths[:, None]]
    return chosen


def cut_chunks(token_ids: NDArray[np.integer], context_tokens: int, bos: int | None) -> NDArray[np.int32]:
    """Cut concatenated held-out tokens into chunks, shaped (chunks, context_tokens); the rest at the end is left out.

    With `bos` (the model's BOS token, where it adds one) each chunk's first token is replaced by it. Raises SamqError
    if there are not enough tokens for one chunk.
    """
    count = len(token_ids) // context_tokens
    if count == 0:
        raise SamqError(
            f"{len(token_ids)} held-out tokens do not fill a chunk of {context_tokens}; "
            "give more held-out text, or lower context_tokens"
        )
    chunks = np.array(token_ids[: count * context_tokens], np.int32).reshape(count, context_tokens)
    if bos is not None:
        chunks[:, 0] = bos
    return chunks


def scored_logits(
    model: Model, chunks: NDArray[np.int32], settings: EvaluationSettings, kv_type: str, progress: Progress = silent
) -> Iterator[NDArray[np.float32]]:
    """Yield, for each chunk, the logits of its scored positions, shaped (positions, vocabulary).

    What is yielded is overwritten by the next chunk's. Raises SamqError if the chunks are of another tokenizer, or if
    a logit is NaN or infinite.
    """
    if chunks.max() >= model.vocab_size:
        raise SamqError(
            f"held-out token {chunks.max()} is outside the {model.vocab_size} tokens of {model.path}; "
            "tokenize the held-out text with this model's tokenizer"
        )
    positions = np.arange(settings.context_tokens)
    scored = (positions >= settings.first_scored) & (positions < settings.context_tokens - 1)
    with model.context(settings.context_tokens, kv_type=kv_type, threads=settings.threads) as context:
        for index, chunk in enumerate(chunks):
            context.clear()
            logits = context.decode(chunk, positions, 0, scored)
            if not np.isfinite(logits).all():
                raise SamqError(logits_not_finite(model.path, f" in chunk {index}"))
            yield logits
            progress(index + 1, len(chunks))


def write_baseline(
    model: Model,
    sha256: str,
    chunks: NDArray[np.int32],
    settings: EvaluationSettings,
    folder: Path,
    progress: Progress = silent,
) -> Baseline:
    """Compute the full-precision model's logits of every scored position into `folder`.

    `logits.npy` is float32, shaped (chunks x scored positions, vocabulary), and appears whole or not at all;
    `baseline.json`, written last, says what it belongs to. The KV cache is F16, whatever the candidates' is.
    """
    shape = (len(chunks) * settings.scored_per_chunk, model.vocab_size)
    temporary = folder / f".logits.{os.getpid()}.tmp"
    try:
        # written as a stream: a memory map on a disk that gets full would end this process by a signal
        with temporary.open("wb") as file:
            write_array_header_2_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for logits in scored_logits(model, chunks, settings, BASELINE_KV_TYPE, progress):
                file.write(np.ascontiguousarray(logits, "<f4").data)
        os.replace(temporary, folder / "logits.npy")
    except OSError as error:
        size = 4 * shape[0] * shape[1]
        raise SamqError(f"cannot write {size} bytes of logits into {folder}: {error.strerror}; free space") from error
    finally:
        temporary.unlink(missing_ok=True)
    baseline = Baseline(
        gguf_sha256=sha256, chunks_digest=chunks_digest(chunks), first_scored=settings.first_scored, shape=shape
    )
    baseline.save(folder / BASELINE_NAME)
    return baseline


def open_baseline(
    folder: Path, chunks: NDArray[np.int32], settings: EvaluationSettings, vocab_size: int
) -> NDArray[np.float32]:
    """Memory-map the baseline's logits, shaped (chunks, scored positions, vocabulary).

    Raises SamqError if they are of other chunks or another vocabulary, or damaged.
    """
    baseline = Baseline.load(folder / BASELINE_NAME)
    if baseline.shape[1] != vocab_size:
        raise SamqError(
            f"the baseline in {folder} has {baseline.shape[1]} tokens in its vocabulary, the candidate {vocab_size}; "
            "compare with the model that the candidate was made from"
        )
    if (baseline.chunks_digest, baseline.first_scored) != (chunks_digest(chunks), settings.first_scored):
        raise SamqError(f"the baseline in {folder} is of other held-out tokens or positions; compute it again")
    try:
        logits = np.load(folder / "logits.npy", mmap_mode="r")
    except (OSError, ValueError) as error:
        raise SamqError(f"cannot read {folder / 'logits.npy'} ({error}); compute the baseline again") from error
    if logits.shape != baseline.shape or logits.dtype != np.float32:
        raise SamqError(
            f"{folder / 'logits.npy'} holds {logits.dtype} {logits.shape} and not float32 {baseline.shape}; "
            "compute the baseline again"
        )
    scored: NDArray[np.float32] = logits.reshape(len(chunks), settings.scored_per_chunk, vocab_size)
    return scored


def chunks_digest(chunks: NDArray[np.int32]) -> str:
    """SHA-256 (hex) over the chunks' shape and token ids."""
    return hashlib.sha256(f"{chunks.shape}".encode() + chunks.astype("<i4").tobytes()).hexdigest()
