"""Loads a GGUF for serving: verifies it, fits it into memory, and checks that it answers."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing

import numpy as np
import psutil

from samq.errors import SamqError
from samq.llamacpp import gpu
from samq.llamacpp.fit import SPARE_BYTES
from samq.llamacpp.gpu_share import GpuShare
from samq.llamacpp.memory import predict_memory
from samq.llamacpp.runtime import Context, Model, captured_log, is_out_of_memory
from samq.serving.model import Loading, ServedModel
from samq.serving.sampling import SamplerSettings
from samq.serving.settings import ServingSettings
from samq.serving.source import ServedGguf, content_sha256

logger = logging.getLogger(__name__)

KV_Q4_WARNING = (
    "a Q4_0 KV cache rounds every key and value to 4 bits, which adds to the error of quantized weights and grows with "
    "the length of the context; the evaluation that chose this model did not measure that error unless its kv_type was "
    "Q4_0 too: prefer Q8_0"
)
_REPEATED = 8  # an answer of one token repeated so often is not sane


class Unfit(SamqError):
    """The model loads, but must not serve; loading it again would not help."""


class MemoryShort(SamqError):
    """There is not enough memory; fewer GPU layers or a shorter context may work."""


def load(gguf: ServedGguf, settings: ServingSettings) -> ServedModel:
    """Verify the file, load it, and let it answer the warm-up prompt; raises as `verify` and `load_verified` do."""
    verify(gguf)
    return load_verified(gguf, settings)


def verify(gguf: ServedGguf) -> None:
    """Raises SamqError if the file has another SHA-256; reads the file only if it has changed since it was last read."""
    if (sha256 := content_sha256(gguf.path)) != gguf.sha256:
        raise SamqError(f"{gguf.path} has the SHA-256 {sha256}, but {gguf.name} has {gguf.sha256}; put the file back")


def load_verified(gguf: ServedGguf, settings: ServingSettings, *, degrade: bool = True) -> ServedModel:
    """Load a verified file, and let it answer the warm-up prompt.

    If there is not enough memory, puts fewer layers on the GPU, then shortens the context. The log and the model's
    `loading` name each step. Without `degrade`, raises MemoryShort instead. Raises SamqError if the file cannot be loaded,
    and Unfit if the model does not answer sanely.
    """
    served = _fit(gguf, settings, degrade)
    try:
        warm_up(served, settings)
    except BaseException:
        served.close()
        raise
    return served


def fits_beside(gguf: ServedGguf, settings: ServingSettings) -> bool:
    """Whether this model fits into the memory that is free now, by llama.cpp's own plan.

    Raises SamqError if llama.cpp cannot read the file.
    """
    _, trained = _describe(gguf)
    memory = predict_memory(
        gguf.path,
        min(settings.context_tokens, trained),
        kv_type=settings.kv_type,
        gpu_layers=settings.gpu_layers,
        threads=settings.threads,
    )
    if _gpu_layers(settings) and (free := gpu.free_bytes()):
        return memory["memory/predicted_vram_bytes"].value < sum(each - SPARE_BYTES for each in free)
    needed = sum(memory[f"memory/{part}_bytes"].value for part in ("file", "kv_cache", "compute_buffer"))
    return needed < psutil.virtual_memory().available


def attempts(gpu_layers: int, context_tokens: int, least_context_tokens: int) -> Iterator[tuple[int, int]]:
    """(GPU layers, context) to try, in order: what the settings ask for, fewer layers, then half the context repeatedly."""
    yield gpu_layers, context_tokens
    while gpu_layers:
        gpu_layers = gpu_layers * 3 // 4
        yield gpu_layers, context_tokens
    while context_tokens > least_context_tokens:
        context_tokens = max(context_tokens // 2, least_context_tokens)
        yield 0, context_tokens


def warm_up(served: ServedModel, settings: ServingSettings) -> None:
    """Let the model answer a prompt; raises Unfit for logits that are not finite, no text, or one repeated token."""
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
            f"{served.loading.context_tokens} tokens; set a shorter warmup_prompt"
        )
    answer: list[int] = []
    with served.in_use(), closing(served.generate(tokens, SamplerSettings(temperature=0))) as generated:
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
        raise _insane(served, "the answer is empty")
    if len(answer) >= _REPEATED and len(set(answer)) == 1:
        raise _insane(served, f"the answer {text[:40]!r} repeats one token")
    logger.info("%s answers the warm-up prompt: %r", served.gguf, text[:80])


def _insane(served: ServedModel, reason: str) -> Unfit:
    return Unfit(f"{served.gguf} does not answer the warm-up prompt sanely: {reason}; evaluate it before promoting it")


def _describe(gguf: ServedGguf) -> tuple[int, int]:
    """The number of layers, and the context that the model was trained for."""
    with Model(gguf.path, gpu_layers=0, allocate=False) as model:
        return model.layers + 1, model.trained_tokens  # llama.cpp counts the output as a layer


def _gpu_layers(settings: ServingSettings) -> int:
    return GpuShare.default().layers if settings.gpu_layers is None else settings.gpu_layers


def _fit(gguf: ServedGguf, settings: ServingSettings, degrade: bool) -> ServedModel:
    """Load with the first of the attempts that fits into memory; without `degrade` raises MemoryShort if the first fails."""
    notes: list[str] = []
    if settings.kv_type == "Q4_0":
        notes.append(KV_Q4_WARNING)
        logger.warning("%s: %s", gguf, KV_Q4_WARNING)
    layers, trained = _describe(gguf)
    context = min(settings.context_tokens, trained)
    if context < settings.context_tokens:
        notes.append(f"the context is {context} tokens, the length that the model was trained for")
        logger.warning("%s: %s", gguf, notes[-1])
    most_layers = _gpu_layers(settings)
    most_layers = layers if most_layers < 0 else min(most_layers, layers)
    failure: SamqError | None = None
    for gpu_layers, tokens in attempts(most_layers, context, min(context, settings.least_context_tokens)):
        if failure:
            notes.append(
                f"{failure}; trying {gpu_layers} of {layers} layers on the GPU and a context of {tokens} tokens"
            )
            logger.warning("%s: out of memory: %s", gguf, notes[-1])
        try:
            model, loaded = _load(gguf, settings, gpu_layers, tokens)
        except MemoryShort as error:
            if not degrade:
                raise
            failure = error
            continue
        loading = Loading(gpu_layers, tokens, settings.kv_type, tuple(notes))
        logger.info("%s: %d of %d layers on the GPU, a context of %d tokens", gguf, gpu_layers, layers, tokens)
        return ServedModel(gguf, model, loaded, loading)
    raise SamqError(f"{gguf} does not fit into memory even with a context of {tokens} tokens: {failure}") from failure


def _load(gguf: ServedGguf, settings: ServingSettings, gpu_layers: int, tokens: int) -> tuple[Model, Context]:
    """One attempt; raises MemoryShort if there is not enough memory to load, or to compute afterwards."""
    with captured_log(errors_only=True) as log, ExitStack() as resources:
        try:
            model = resources.enter_context(Model(gguf.path, gpu_layers=gpu_layers))
            context = resources.enter_context(
                model.context(tokens, outputs=1, kv_type=settings.kv_type, threads=settings.threads)
            )
        except SamqError as error:
            if is_out_of_memory(log()):
                raise MemoryShort(str(error)) from error
            raise
        if gpu_layers and (left := min(gpu.free_bytes(), default=SPARE_BYTES)) < SPARE_BYTES:
            raise MemoryShort(
                f"{left // 2**20} MiB of a GPU's memory would be left, but llama.cpp may need "
                f"{SPARE_BYTES // 2**20} MiB to compute"
            )
        resources.pop_all()
    return model, context
