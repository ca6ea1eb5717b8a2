"""Whether torch and llama.cpp compute the same model: gradients are taken of the one, files are made for the other.

They are not the same where transformers leaves out what a GGUF holds, or where llama.cpp's converter and transformers
read a configuration differently. Sensitivities would then be another model's, and nothing else would show it.
"""

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
from samq.records import ModelSource, Record

CHUNK_TOKENS, CHUNKS = 256, 2
# Of the median, since rounding sends a few tokens of a mixture of experts to other experts. Trained models of 46M to 135M
# parameters and tiny random ones of 75 architectures have 2e-7 to 6e-6 in float32 and F16, which are the roundings of weights and
# activations (Gemma 4's random one 3e-5, where GELU's table in F16 is amplified), and up to 1e-3 in bfloat16.
LIMIT_NATS = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}


class Agreement(Record):
    """How far llama.cpp's predictions on the full-precision GGUF and torch's lie apart."""

    SCHEMA: ClassVar[str] = "samq.agreement/1"

    tokens: int = Field(description="positions that were compared")
    dtype: str = Field(description="of the torch model")
    median_kld_nats: float
    mean_kld_nats: float
    limit_nats: float = Field(description="of the median")


def settings_for(training_context: int) -> EvaluationSettings:
    """Every position but the last of a few hundred tokens, in chunks that the model was trained for."""
    return EvaluationSettings(context_tokens=max(16, min(CHUNK_TOKENS, training_context)), score_from=0, chunks=CHUNKS)


def enough_tokens(tokens: NDArray[np.int32], settings: EvaluationSettings) -> NDArray[np.int32]:
    """The first of the tokens, from the start again if there are too few: both sides get the same ones."""
    return np.resize(tokens, CHUNKS * settings.context_tokens)


def measure_agreement(
    model: PreTrainedModel, dtype: str, chunks: NDArray[np.int32], baseline: Path, settings: EvaluationSettings
) -> Agreement:
    """Compare the torch model with llama.cpp's logits in the folder `baseline`, on `chunks` of token ids (N, T).

    A vocabulary that torch pads is compared as far as llama.cpp's goes. Raises SamqError if torch's is smaller.
    """
    vocabulary = Baseline.load(baseline / BASELINE_NAME).shape[1]
    expected = open_baseline(baseline, chunks, settings, vocabulary)
    if (torch_vocabulary := model.get_output_embeddings().weight.shape[0]) < vocabulary:
        raise SamqError(
            f"the torch model has {torch_vocabulary} tokens and its GGUF {vocabulary}; give the folder that the GGUF was made "
            "from, or convert it again"
        )
    klds = []
    for ids, logits in zip(chunks, expected, strict=True):
        with torch.no_grad():
            output = model(input_ids=torch.tensor(ids[None], dtype=torch.long, device=model.device), use_cache=False)
        ours = output.logits[0, settings.first_scored : -1, :vocabulary].float().cpu().numpy()
        klds.append(compare_logits(logits, ours, ids[settings.first_scored + 1 :])["kld"].to_numpy())
    kld = np.concatenate(klds)
    return Agreement(
        tokens=len(kld),
        dtype=dtype,
        median_kld_nats=float(np.median(kld)),
        mean_kld_nats=float(kld.mean()),
        limit_nats=LIMIT_NATS[dtype],
    )


def require_agreement(agreement: Agreement, source: ModelSource) -> None:
    """Raise SamqError if the two are not one model, or torch's predictions are not finite."""
    if agreement.median_kld_nats <= agreement.limit_nats:
        return
    if source.gguf is not None:
        advice = "transformers reads something of it otherwise; give the folder that the GGUF was made from (hf_folder)"
    else:
        advice = (
            "llama.cpp does not compute what its configuration says; compare that with the published model's, or choose another "
            "model"
        )
    raise SamqError(
        f"torch and llama.cpp compute different models of {source.name}: their predictions lie "
        f"{agreement.median_kld_nats:.2g} nats apart (median of {agreement.tokens} tokens in {agreement.dtype}; at most "
        f"{agreement.limit_nats:g}); {advice}"
    )
