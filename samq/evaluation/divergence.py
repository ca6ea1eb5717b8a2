"""Fidelity: how far a candidate's next-token distributions lie from the full-precision model's, on held-out text.

For a scored position with the baseline's distribution P and the candidate's Q over the vocabulary,

    KLD = sum over v of P(v) (ln P(v) - ln Q(v)), in nats
    delta p = Q(t) - P(t), with t the token that follows in the text

The statistics are those of `llama-perplexity --kl-divergence`, under its names. Three things differ:

- The program keeps the baseline as 16-bit log-probabilities. SAMQ keeps 32-bit logits.
- The program leaves tokens out of the KLD if the baseline gives them less than e^-16. SAMQ leaves out none.
- The program's standard errors take all tokens as independent. SAMQ's allow for the likeness of the tokens of one chunk.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from samq.evaluation.baseline import BASELINE_KV_TYPE, BASELINE_NAME, Baseline, open_baseline, scored_logits
from samq.evaluation.settings import EvaluationSettings
from samq.llamacpp.runtime import Model, default_threads
from samq.progress import Progress, silent
from samq.records import Metric

_ROWS = 4  # positions that a thread compares at a time: a few MB of float64, which stay in the cache


def measure_divergence(
    model: Model,
    chunks: NDArray[np.int32],
    baseline: Path,
    settings: EvaluationSettings,
    progress: Progress = silent,
    *,
    sha256: str | None = None,
) -> tuple[dict[str, Metric], pd.DataFrame]:
    """Compare a candidate with the baseline in folder `baseline`, one chunk at a time.

    `sha256` is the candidate's. If the baseline is of that very file, its logits are the candidate's. They are computed a
    second time only if the candidate's KV cache has another type than the baseline's.

    Returns the metrics (`fidelity/...`) and a row for each scored token. A row has chunk, position (of that token in its
    chunk), token, kld, nll, nll_base (nats), delta_p, same_top. Raises SamqError if the baseline is of other tokens or another
    vocabulary, or damaged, and if the candidate's logits are not finite.
    """
    expected = open_baseline(baseline, chunks, settings, model.vocab_size)
    is_baseline = Baseline.load(baseline / BASELINE_NAME).gguf_sha256 == sha256
    if is_baseline and settings.kv_type == BASELINE_KV_TYPE:
        candidate: Iterable[NDArray[np.float32]] = expected
    else:
        candidate = scored_logits(model, chunks, settings, settings.kv_type)
    first_target = settings.first_scored + 1
    tables = []
    with ThreadPoolExecutor(settings.threads or default_threads()) as pool:
        for index, logits in enumerate(candidate):
            targets = chunks[index, first_target:]
            parts = [slice(start, start + _ROWS) for start in range(0, len(targets), _ROWS)]
            compared = pool.map(
                lambda s, i=index, q=logits, t=targets: compare_logits(expected[i, s], q[s], t[s]), parts
            )
            table = pd.concat(compared, ignore_index=True)
            table.insert(0, "chunk", np.int32(index))
            table.insert(1, "position", np.arange(first_target, settings.context_tokens, dtype=np.int32))
            table.insert(2, "token", targets)
            tables.append(table)
            progress(index + 1, len(chunks))
    scored = pd.concat(tables, ignore_index=True)
    return summarize_divergence(scored), scored


def compare_logits(
    baseline: NDArray[np.float32], candidate: NDArray[np.float32], targets: NDArray[np.int32]
) -> pd.DataFrame:
    """Compare two sets of logits, shaped (positions, vocabulary), in float64; a row for each position.

    Equal logits give a divergence of exactly 0. Columns: kld, nll, nll_base (nats), delta_p, same_top.
    """
    base, cand = baseline.astype(np.float64), candidate.astype(np.float64)
    base -= base.max(axis=1, keepdims=True)
    cand -= cand.max(axis=1, keepdims=True)
    weights = np.exp(base)
    total = weights.sum(axis=1)
    log_base, log_cand = np.log(total), np.log(np.exp(cand).sum(axis=1))  # logarithms of the partition functions
    rows = np.arange(len(targets))
    nll_base = log_base - base[rows, targets]
    nll = log_cand - cand[rows, targets]
    return pd.DataFrame(
        {
            "kld": np.einsum("pv,pv->p", weights, base - cand) / total + log_cand - log_base,
            "nll": nll,
            "nll_base": nll_base,
            "delta_p": np.exp(-nll) - np.exp(-nll_base),
            "same_top": base.argmax(axis=1) == cand.argmax(axis=1),
        }
    )


def summarize_divergence(scored: pd.DataFrame) -> dict[str, Metric]:
    """The metrics of per-token scores; `n` is the number of scored tokens, and quantiles have no standard error."""
    n = len(scored)
    chunk = scored["chunk"]
    kld, kld_error = _mean(scored["kld"], chunk)
    nll, nll_error = _mean(scored["nll"], chunk)
    log_ratio, log_ratio_error = _mean(scored["nll"] - scored["nll_base"], chunk)
    top, top_error = _mean(scored["same_top"].astype(float), chunk)
    square, square_error = _mean(scored["delta_p"] ** 2, chunk)
    rms = np.sqrt(square)
    p50, p90, p99, p999 = np.quantile(scored["kld"], [0.5, 0.9, 0.99, 0.999])
    values = {
        "mean_kld_nats": (kld, kld_error),
        "kld_median_nats": (p50, None),
        "kld_p90_nats": (p90, None),
        "kld_p99_nats": (p99, None),
        "kld_p999_nats": (p999, None),
        "kld_max_nats": (scored["kld"].max(), None),
        "same_top_percent": (100 * top, 100 * top_error),
        "rms_delta_p_percent": (100 * rms, 100 * square_error / (2 * rms) if rms else 0.0),
        "perplexity": (np.exp(nll), np.exp(nll) * nll_error),
        "perplexity_ratio": (np.exp(log_ratio), np.exp(log_ratio) * log_ratio_error),
    }
    return {
        f"fidelity/{name}": Metric(value=float(value), stderr=None if error is None else float(error), n=n)
        for name, (value, error) in values.items()
    }


def _mean(values: pd.Series, chunk: pd.Series) -> tuple[float, float]:
    """Mean and standard error, the larger of two.

    One takes every token as independent, as llama-perplexity does. The other is of the chunks' means: tokens of a chunk
    share their text, so they are fewer observations than they seem. With few chunks the second is itself uncertain and
    can come out too small by chance; hence the larger.
    """
    independent = values.std(ddof=1) / np.sqrt(len(values))
    means = values.groupby(chunk).mean()  # chunks are of one size, so the mean of means is the mean
    clustered = means.std(ddof=1) / np.sqrt(len(means)) if len(means) > 1 else 0.0
    return float(values.mean()), float(max(independent, clustered))
