"""Whether torch and llama.cpp compute the same model: gradients are taken of the one, files are made for the other.

They are not the same where transformers leaves out what a GGUF holds, or where llama.cpp's converter and transformers
read a configuration differently. Sensitivities would then be another model's, and nothing else would show it.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from transformers import PreTrainedModel

from samq.errors import SamqError
from samq.evaluation.baseline import BASELINE_NAME, Baseline, open_baseline
from samq.evaluation.divergence import compare_logits
from samq.evaluation.settings import EvaluationSettings
from samq.gguf.file import read_tensors
from samq.records import ModelSource, Record
from samq.sensitivity.blocks import logits_of
from samq.sensitivity.offloading import has_offloaded

CHUNK_TOKENS, CHUNKS = 256, 2
# Of the median, since rounding sends a few tokens of a mixture of experts to other experts. Trained models of 46M to 135M
# parameters and tiny random ones of 75 architectures have 2e-7 to 6e-6 in float32 and F16, which are the roundings of weights and
# activations (Gemma 4's random one 3e-5, where GELU's table in F16 is amplified). In bfloat16, trained ones have up to 1.4e-4
# and random ones up to 3e-4, but for Gemma 3n and 4 (2.4e-3). A wrong model may have no more than 6e-3 (Llama 3's `rope_freqs`
# left out).
LIMIT_NATS = {"float32": 1e-4, "bfloat16": 3e-3, "float16": 3e-3}
# Some models amplify every rounding. They may lie this many times further apart than their own predictions do when each weight
# is off by a random part of what the file's type or torch's rounds to. Measured: 1 to 5 times in float32, up to 2 in the others.
ROUNDINGS = {"float32": 10, "bfloat16": 3, "float16": 3}
# llama.cpp multiplies a tensor in MXFP4 with inputs that it rounds to 8 bits: the largest of a block to 1/127
UNIT_ROUNDOFF = {"F16": 2.0**-11, "BF16": 2.0**-8, "F32": 2.0**-24, "MXFP4": 2.0**-6}
OF_TORCH = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}


class Agreement(Record):
    """How far llama.cpp's predictions on the full-precision GGUF and torch's lie apart."""

    SCHEMA: ClassVar[str] = "samq.agreement/1"

    tokens: int = Field(description="positions that were compared")
    dtype: str = Field(description="of the torch model")
    median_kld_nats: float
    mean_kld_nats: float
    limit_nats: float = Field(description="of the median")
    rounding_kld_nats: float | None = Field(
        default=None, description="median of torch's predictions with each weight off by a rounding; None: not needed"
    )


def settings_for(training_context: int) -> EvaluationSettings:
    """Every position but the last of a few hundred tokens, in chunks that the model was trained for."""
    return EvaluationSettings(context_tokens=max(16, min(CHUNK_TOKENS, training_context)), score_from=0, chunks=CHUNKS)


def enough_tokens(tokens: NDArray[np.int32], settings: EvaluationSettings) -> NDArray[np.int32]:
    """The first of the tokens, from the start again if there are too few: both sides get the same ones."""
    return np.resize(tokens, CHUNKS * settings.context_tokens)


def measure_agreement(
    model: PreTrainedModel,
    dtype: str,
    chunks: NDArray[np.int32],
    baseline: Path,
    settings: EvaluationSettings,
    gguf: Path,
) -> Agreement:
    """Compare the torch model with llama.cpp's logits in the folder `baseline`, on `chunks` of token ids (N, T).

    The logits are of the file `gguf`. A vocabulary that torch pads is compared as far as llama.cpp's goes. If the two lie apart,
    the model's weights are changed to see how much roundings do, unless they are on disk. Raises SamqError if torch's vocabulary
    is smaller.
    """
    vocabulary = Baseline.load(baseline / BASELINE_NAME).shape[1]
    expected = open_baseline(baseline, chunks, settings, vocabulary)
    if (torch_vocabulary := model.get_output_embeddings().weight.shape[0]) < vocabulary:
        raise SamqError(
            f"the torch model has {torch_vocabulary} tokens and its GGUF {vocabulary}; give the folder that the GGUF was made "
            "from, or convert it again"
        )

    def predictions() -> Iterator[NDArray[np.float32]]:
        tokens = torch.from_numpy(chunks.astype(np.int64))
        for logits in logits_of(model, [(ids[None], torch.ones_like(ids[None])) for ids in tokens]):
            yield logits[0, settings.first_scored : -1, :vocabulary].float().cpu().numpy()

    def divergence(base: Iterable[NDArray[np.float32]], other: Iterable[NDArray[np.float32]]) -> NDArray[np.float64]:
        tables = [
            compare_logits(logits, ours, ids[settings.first_scored + 1 :])
            for ids, logits, ours in zip(chunks, base, other, strict=True)
        ]
        return np.concatenate([table["kld"].to_numpy() for table in tables])

    kld = divergence(expected, predictions())
    median, limit, rounding = float(np.median(kld)), LIMIT_NATS[dtype], None
    if median > limit and not has_offloaded(model):
        before = list(predictions())
        types = {tensor.type for tensor in read_tensors(gguf).values()}
        _shake(model, max(OF_TORCH[dtype], *(UNIT_ROUNDOFF.get(kind, 0.0) for kind in types)))
        rounding = float(np.median(divergence(before, predictions())))
        limit = max(limit, ROUNDINGS[dtype] * rounding)
    return Agreement(
        tokens=len(kld),
        dtype=dtype,
        median_kld_nats=median,
        mean_kld_nats=float(kld.mean()),
        limit_nats=limit,
        rounding_kld_nats=rounding,
    )


def _shake(model: PreTrainedModel, roundoff: float) -> None:
    """Change each matrix's weights by a random part of `roundoff` of their size, always the same one."""
    for number, parameter in enumerate(model.parameters()):
        if parameter.ndim > 1:
            generator = torch.Generator(parameter.device).manual_seed(number)
            noise = torch.rand(parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
            parameter.data.mul_(noise.mul_(2 * roundoff).add_(1 - roundoff))


def require_agreement(agreement: Agreement, source: ModelSource) -> None:
    """Raise SamqError if the two are not one model, or torch's predictions are not finite."""
    if agreement.median_kld_nats <= agreement.limit_nats:
        return
    if source.gguf is not None:
        advice = (
            "transformers reads it differently from llama.cpp; give the Hugging Face folder that the GGUF was made from as the "
            "model (`samq compensate`: --model)"
        )
    else:
        advice = (
            "llama.cpp does not compute what its configuration says; compare that with the published model's, or choose another "
            "model"
        )
    raise SamqError(
        f"torch and llama.cpp compute different models of {source.name}: their predictions lie "
        f"{agreement.median_kld_nats:.2g} nats apart (median of {agreement.tokens} tokens in {agreement.dtype}; at most "
        f"{agreement.limit_nats:.2g}); {advice}"
    )
