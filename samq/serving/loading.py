"""Loading a GGUF so that it can serve: verified, fitted into memory, and proven to answer."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing

import numpy as np
import psutil

from samq.errors import SamqError
from samq.evaluation.settings import EvaluationSettings
from samq.llamacpp import gpu
from samq.llamacpp.memory import predict_memory
from samq.llamacpp.runtime import Context, Model, captured_log, default_gpu_layers, is_out_of_memory
from samq.serving.model import Loading, ServedModel
from samq.serving.sampling import Sampling
from samq.serving.settings import ServingSettings
from samq.serving.source import ServedGguf, content_sha256

logger = logging.getLogger(__name__)

KV_Q4_WARNING = (
    "a Q4_0 KV cache rounds every key and value to 4 bits, which adds to the error of quantized weights and grows with "
    "the length of the context; the evaluation that chose this model saw none of it unless its kv_type was Q4_0 too: "
    "prefer Q8_0"
)
# What computing takes of a GPU beside what loading took. llama.cpp ends the process when it does not get it (CUDA_CHECK in
# ggml-cuda.cu), and leaves as much free itself where it chooses layers (fit_params_target in its common.h).
GPU_SPARE_BYTES = 2**30
_REPEATED = 8  # one token so many times, and no other, is no answer


class Unfit(SamqError):
    """The model loads, and must not serve; loading it again would change nothing."""


class MemoryShort(SamqError):
    """Less of the model on the GPU, or a shorter context, may load."""


def load(gguf: ServedGguf, settings: ServingSettings) -> ServedModel:
    """Verify the file, load it, and let it answer the warm-up prompt; raises what `verify` and `load_verified` do."""
    verify(gguf)
    return load_verified(gguf, settings)


def verify(gguf: ServedGguf) -> None:
    """Raises SamqError if the file is not what it should be; what has not changed since it was read is not read again."""
    if (found := content_sha256(gguf.path)) != gguf.sha256:
        raise SamqError(f"{gguf.path} has the SHA-256 {found}, and not {gguf.sha256} as {gguf.name} has; put it back")


def load_verified(gguf: ServedGguf, settings: ServingSettings, *, degrade: bool = True) -> ServedModel:
    """Load a file that is what it should be, and let it answer the warm-up prompt.

    When memory does not suffice, fewer layers go to the GPU, then the context is shortened; each step is logged and
    noted in the model's `loading`. Without `degrade`, MemoryShort is raised instead. Raises SamqError if the file
    cannot be loaded, and Unfit if it does not answer sanely.
    """
    served = _fit(gguf, settings, degrade)
    try:
        warm_up(served, settings)
    except BaseException:
        served.close()
        raise
    return served


def fits_beside(gguf: ServedGguf, settings: ServingSettings) -> bool:
    """Whether the memory that is free now would hold this model too, by llama.cpp's own plan of it.

    Raises SamqError if llama.cpp cannot read the file.
    """
    _, trained = _describe(gguf)
    planned = EvaluationSettings(
        vram_context_tokens=min(settings.context_tokens, trained),
        kv_type=settings.kv_type,
        threads=settings.threads,
        gpu_layers=settings.gpu_layers,
    )
    memory = predict_memory(gguf.path, planned)
    if _gpu_layers(settings) and (free := gpu.free_bytes()):
        return memory["memory/predicted_vram_bytes"].value < sum(each - GPU_SPARE_BYTES for each in free)
    needed = sum(memory[f"memory/{part}_bytes"].value for part in ("file", "kv_cache", "compute_buffer"))
    return needed < psutil.virtual_memory().available


def attempts(gpu_layers: int, context_tokens: int, least_context_tokens: int) -> Iterator[tuple[int, int]]:
    """(GPU layers, context) to try, in order: all that is wanted, fewer layers, then half the context again and again."""
    yield gpu_layers, context_tokens
    while gpu_layers:
        gpu_layers = gpu_layers * 3 // 4
        yield gpu_layers, context_tokens
    while context_tokens > least_context_tokens:
        context_tokens = max(context_tokens // 2, least_context_tokens)
        yield 0, context_tokens


def warm_up(served: ServedModel, settings: ServingSettings) -> None:
    """Let the model answer a prompt; raises Unfit for numbers that are none, no text, or one token over and over."""
    prompt = settings.warmup_prompt
    tokens = (
        served.tokenize_chat([{"role": "user", "content": prompt}])
        if served.model.chat_template
        else served.tokenize(prompt)
    )
    room = served.loading.context_tokens - len(tokens)
    if room < _REPEATED:
        raise Unfit(
            f"the warm-up prompt of {len(tokens)} tokens does not fit into a context of "
            f"{served.loading.context_tokens}; set a shorter warmup_prompt"
        )
    answer: list[int] = []
    with served.in_use(), closing(served.generate(tokens, Sampling(temperature=0))) as generated:
        for token in generated:
            if not np.isfinite(token.logits).all():
                raise _insane(served, "its logits are not all finite")
            if served.model.is_end(token.id):
                break
            answer.append(token.id)
            if len(answer) == min(settings.warmup_tokens, room):
                break
    text = b"".join(map(served.model.piece, answer)).decode(errors="replace")
    if not text.strip():
        raise _insane(served, "it says nothing")
    if len(answer) >= _REPEATED and len(set(answer)) == 1:
        raise _insane(served, f"it says {text[:40]!r}, one token over and over")
    logger.info("%s answers the warm-up prompt: %r", served.gguf, text[:80])


def _insane(served: ServedModel, what: str) -> Unfit:
    return Unfit(f"{served.gguf} does not answer the warm-up prompt sanely: {what}; evaluate it before promoting it")


def _describe(gguf: ServedGguf) -> tuple[int, int]:
    """Layers, and the longest context that the model was trained for."""
    with Model(gguf.path, gpu_layers=0, allocate=False) as model:
        return model.layers + 1, model.trained_tokens  # llama.cpp counts the output as a layer


def _gpu_layers(settings: ServingSettings) -> int:
    return default_gpu_layers() if settings.gpu_layers is None else settings.gpu_layers


def _fit(gguf: ServedGguf, settings: ServingSettings, degrade: bool) -> ServedModel:
    """Load with the first of the attempts that memory suffices for; raises MemoryShort if only the first may be made."""
    notes: list[str] = []
    if settings.kv_type == "Q4_0":
        notes.append(KV_Q4_WARNING)
        logger.warning("%s: %s", gguf, KV_Q4_WARNING)
    layers, trained = _describe(gguf)
    context = min(settings.context_tokens, trained)
    if context < settings.context_tokens:
        notes.append(f"the context is {context} tokens, all that the model was trained for")
        logger.warning("%s: %s", gguf, notes[-1])
    wanted = _gpu_layers(settings)
    wanted = layers if wanted < 0 else min(wanted, layers)
    failure: SamqError | None = None
    for gpu_layers, tokens in attempts(wanted, context, min(context, settings.least_context_tokens)):
        if failure:
            notes.append(
                f"{failure}; trying {gpu_layers} of {layers} layers on the GPU and a context of {tokens} tokens"
            )
            logger.warning("%s: out of memory: %s", gguf, notes[-1])
        try:
            model, made = _load(gguf, settings, gpu_layers, tokens)
        except MemoryShort as error:
            if not degrade:
                raise
            failure = error
            continue
        loading = Loading(gpu_layers, tokens, settings.kv_type, tuple(notes))
        logger.info("%s: %d of %d layers on the GPU, a context of %d tokens", gguf, gpu_layers, layers, tokens)
        return ServedModel(gguf, model, made, loading)
    raise SamqError(f"{gguf} does not fit into memory even with a context of {tokens} tokens: {failure}") from failure


def _load(gguf: ServedGguf, settings: ServingSettings, gpu_layers: int, tokens: int) -> tuple[Model, Context]:
    """One attempt; raises MemoryShort where memory does not suffice, or would not as soon as there is work."""
    with captured_log(errors_only=True) as log, ExitStack() as made:
        try:
            model = made.enter_context(Model(gguf.path, gpu_layers=gpu_layers))
            context = made.enter_context(
                model.context(tokens, outputs=1, kv_type=settings.kv_type, threads=settings.threads)
            )
        except SamqError as error:
            if is_out_of_memory(log()):
                raise MemoryShort(str(error)) from error
            raise
        if gpu_layers and (left := min(gpu.free_bytes(), default=GPU_SPARE_BYTES)) < GPU_SPARE_BYTES:
            raise MemoryShort(
                f"{left // 2**20} MiB of a GPU's memory would be left, and llama.cpp may take "
                f"{GPU_SPARE_BYTES // 2**20} while it computes"
            )
        made.pop_all()
    return model, context
