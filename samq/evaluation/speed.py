"""Speed: what one user alone waits for, with the same tokens for every candidate.

A request is a prompt of held-out tokens evaluated at once, followed by greedy decoding of a fixed number of tokens. End tokens
count as others. Requests come one after the other and differ in their prompts. Warm-up requests come first and do not count.
"""

from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from samq.evaluation.settings import EvaluationSettings
from samq.llamacpp.runtime import Context, Model
from samq.progress import Progress, silent
from samq.records import Metric


def measure_speed(
    model: Model, token_ids: NDArray[np.int32], settings: EvaluationSettings, progress: Progress = silent
) -> dict[str, Metric]:
    """Time the requests; `token_ids` are concatenated held-out tokens, used again from the start if they run out.

    Throughputs are means over requests, with their standard errors. `speed/latency_p99_ms` is a latency that was
    observed: with fewer than 100 requests (see `n`) it is the slowest one.
    """
    total = settings.speed_warmup + settings.speed_requests
    prompts = np.resize(token_ids, (total, settings.speed_prompt_tokens))
    if model.adds_bos and model.bos is not None:
        prompts[:, 0] = model.bos
    length = settings.speed_prompt_tokens + settings.speed_generated_tokens
    times = []
    with model.context(length, outputs=1, kv_type=settings.kv_type, threads=settings.threads) as context:
        for index, prompt in enumerate(prompts):
            times.append(_request(context, prompt, settings.speed_generated_tokens))
            progress(index + 1, total)
    first, whole = np.array(times[settings.speed_warmup :]).T
    return {
        "speed/prompt_tokens_per_s": _mean(settings.speed_prompt_tokens / first),
        "speed/generation_tokens_per_s": _mean((settings.speed_generated_tokens - 1) / (whole - first)),
        "speed/time_to_first_token_ms": _mean(1000 * first),
        "speed/latency_p50_ms": Metric(value=1000 * float(np.median(whole)), n=len(whole)),
        "speed/latency_p99_ms": Metric(value=1000 * float(np.quantile(whole, 0.99, method="higher")), n=len(whole)),
    }


def _request(context: Context, prompt: NDArray[np.int32], generated_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and to the last."""
    context.clear()
    positions = np.arange(len(prompt))
    start = perf_counter()
    token = context.decode(prompt, positions, 0, positions == len(prompt) - 1)[0].argmax()
    first = perf_counter() - start
    for position in range(len(prompt), len(prompt) + generated_tokens - 1):
        token = context.decode([token], [position], 0, True)[0].argmax()
    return first, perf_counter() - start


def _mean(values: NDArray[np.float64]) -> Metric:
    """Mean of one value a request, and its standard error."""
    n = len(values)
    return Metric(value=float(values.mean()), stderr=float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None, n=n)
