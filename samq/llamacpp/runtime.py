"""llama.cpp in this process: a model, contexts on it, batches of tokens in, logits out.

All measurements and the server build on this module. It knows nothing about metrics or prompts. It uses the C API
through llama_cpp's ctypes bindings. Only there can sequences share a batch, and a caller choose the tokens whose logits are
computed. Models and contexts are context managers, which free llama.cpp's memory at the end of the `with`.
"""

import ctypes
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Self

import llama_cpp.llama_cpp as api
import numpy as np
import psutil
from numpy.typing import ArrayLike, NDArray

from samq.errors import SamqError, TextError
from samq.llamacpp.gpu_share import GpuShare
from samq.llamacpp.tokenizing import stack_bytes, with_stack
from samq.text import encode

logger = logging.getLogger(__name__)

KV_TYPES = {"F32": api.GGML_TYPE_F32, "F16": api.GGML_TYPE_F16, "Q8_0": api.GGML_TYPE_Q8_0, "Q4_0": api.GGML_TYPE_Q4_0}
PHYSICAL_BATCH_TOKENS = 512  # llama.cpp's default n_ubatch; fixed, since the shapes of the arithmetic depend on it
_LOG_LEVELS = {3: logging.WARNING, 4: logging.ERROR}  # ggml.h, enum ggml_log_level
_BEYOND_TRAINING = "possible training context overflow"  # a false alarm: of a shared context each sequence is shorter
_OUT_OF_MEMORY = re.compile(
    r"out of memory|failed to allocate|unable to allocate|cannot allocate|insufficient memory|bad_alloc|alloc\w* failed",
    re.IGNORECASE,
)
_captures: list[tuple[int, list[str]]] = []  # (lowest level to capture, pieces of text so far)
_captures_lock = threading.Lock()


@api.llama_log_callback  # type: ignore[untyped-decorator]
def _on_log(level: int, text: bytes, _user_data: object) -> None:
    """Send llama.cpp's warnings and errors to logging, and its lines to the captures that take their level."""
    line = text.decode(errors="replace")
    for lowest, pieces in tuple(_captures):
        if level >= lowest:
            pieces.append(line)
    if level in _LOG_LEVELS and line.strip() and _BEYOND_TRAINING not in line:
        logger.log(_LOG_LEVELS[level], line.strip())


@lru_cache
def _start_backend() -> None:
    """Load the backends once a process, and redirect the log, which llama_cpp would print."""
    api.llama_log_set(_on_log, ctypes.c_void_p(0))
    api.llama_backend_init()


@contextmanager
def captured_log(*, errors_only: bool = False) -> Iterator[Callable[[], list[str]]]:
    """Collect llama.cpp's log during the `with` block; yields a function that returns the lines so far."""
    pieces: list[str] = []
    capture = (max(_LOG_LEVELS) if errors_only else 0, pieces)
    with _captures_lock:
        _captures.append(capture)
    try:
        yield lambda: "".join(pieces).splitlines()
    finally:
        with _captures_lock:
            _captures[:] = [other for other in _captures if other is not capture]


def default_threads() -> int:
    """The number of physical cores that this process may use. Hyper-threads do not speed up matrix products."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(psutil.cpu_count(logical=False) or 1, allowed or 1)


def system_info() -> str:
    """The features of llama.cpp's build and of the processor: `CPU : AVX2 = 1 | ...`."""
    _start_backend()
    features: bytes = api.llama_print_system_info()
    return features.decode().strip(" |")


class LoadError(SamqError):
    """llama.cpp cannot load a GGUF; `reason` is its own."""

    def __init__(self, path: Path, reason: str, advice: str) -> None:
        """Put the sentence together."""
        super().__init__(f"llama.cpp cannot load {path}: {reason}; {advice}")
        self.reason = reason


class Model:
    """The weights and the vocabulary of one GGUF."""

    def __init__(self, path: Path, *, gpu_layers: int | GpuShare | None = None, allocate: bool = True) -> None:
        """Load the GGUF at `path`, with `gpu_layers` layers on the GPU (None: `GpuShare.default()`).

        Without `allocate` only the metadata is loaded, and contexts only log the memory that they would need. Raises
        LoadError, with llama.cpp's own reason, if the file cannot be loaded.
        """
        _start_backend()
        params = api.llama_model_default_params()
        self.gpu_share = GpuShare(gpu_layers) if isinstance(gpu_layers, int) else gpu_layers or GpuShare.default()
        kept = self.gpu_share.put_into(params)
        if not allocate:
            params.no_alloc = True
            params.load_mode = api.LLAMA_LOAD_MODE_NONE  # llama.cpp cannot map a model that it does not allocate
        with captured_log(errors_only=True) as log:
            handle = api.llama_model_load_from_file(os.fsencode(path), params)
        del kept
        if not handle:
            advice = (
                "the GPU's memory does not hold it; set gpu_layers to fewer"
                if is_out_of_memory(log()) and params.n_gpu_layers
                else "convert the model again, or choose another one"
            )
            raise LoadError(path, first_error(log()), advice)
        self.path = Path(path)
        self._model: Any = handle
        self.vocab = api.llama_model_get_vocab(handle)
        self.layers = api.llama_model_n_layer(handle)
        self.vocab_size = api.llama_vocab_n_tokens(self.vocab)
        self.adds_bos = bool(api.llama_vocab_get_add_bos(self.vocab))
        # where the file does not name one, llama.cpp guesses a token, which can be any word
        self.bos = api.llama_vocab_bos(self.vocab) if self.adds_bos or self._names("bos") else None
        self.eos = api.llama_vocab_eos(self.vocab) if self._names("eos") else None
        self.trained_tokens = api.llama_model_n_ctx_train(handle)  # the context length of the training
        # a recurrent model keeps one state, which cannot be cut back to a part of the text
        self.is_recurrent = bool(api.llama_model_is_recurrent(handle) or api.llama_model_is_hybrid(handle))
        template = api.llama_model_chat_template(handle, None)
        self.chat_template = template.decode(errors="replace") if template else None
        self._tokenizer = [self._metadata(f"tokenizer.ggml.{key}") or "" for key in ("model", "pre")]

    def _names(self, token: str) -> bool:
        """Whether the file's metadata name this token: `bos` or `eos`."""
        return self._metadata(f"tokenizer.ggml.{token}_token_id") is not None

    def _metadata(self, key: str) -> str | None:
        """A short value of the file's metadata; None if it has no such key."""
        buffer = ctypes.create_string_buffer(256)
        length = api.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode(errors="replace") if length >= 0 else None

    def __enter__(self) -> Self:
        """Return the model itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the model."""
        self.close()

    def close(self) -> None:
        """Free the weights. Close the model's contexts first."""
        if self._model:
            api.llama_model_free(self._model)
            self._model = None

    def context(
        self,
        tokens: int,
        *,
        sequences: int = 1,
        outputs: int | None = None,
        kv_type: str = "F16",
        threads: int | None = None,
        shared: bool = False,
    ) -> "Context":
        """Make a context: a KV cache of `tokens` for each of `sequences`, and compute buffers.

        With `shared` the sequences have one cache of `tokens` together, and a token may belong to several of them.
        `outputs` is the largest number of tokens of a batch whose logits are computed (None: all). `kv_type` is one of
        `KV_TYPES`, and `threads` defaults to `default_threads()`. Raises SamqError if memory does not suffice.
        """
        return Context(self, tokens, sequences, outputs, kv_type, threads or default_threads(), shared)

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> NDArray[np.int32]:
        """Token ids of `text`.

        `add_special` adds the special tokens that the model expects around a whole text: BOS before it, and EOS after it
        if it was trained so. `parse_special` reads `<|im_start|>` and the like as the special tokens of that name, and
        not as plain text. Raises TextError if llama.cpp cannot tokenize the text, and SamqError without a tokenizer.
        """
        if api.llama_vocab_type(self.vocab) == api.LLAMA_VOCAB_TYPE_NONE:  # llama.cpp would end the process
            raise SamqError(f"{self.path} has no tokenizer; convert the model again with its tokenizer")
        data = encode(text)
        stack = stack_bytes(text, *self._tokenizer)
        size = len(data) + 8  # enough for almost every text: a token is seldom shorter than a byte
        while True:
            tokens = np.empty(size, np.int32)
            buffer = tokens.ctypes.data_as(ctypes.POINTER(api.llama_token))
            arguments = self.vocab, data, len(data), buffer, size, add_special, parse_special
            count: int = with_stack(partial(api.llama_tokenize, *arguments), stack)
            if count >= 0:
                return tokens[:count].copy()
            if -count <= size:
                raise TextError(
                    f"llama.cpp cannot tokenize {len(data)} bytes of text; cut the text into smaller pieces"
                )
            size = -count

    def tokenize_prompt(self, text: str, *, parse_special: bool = False) -> NDArray[np.int32]:
        """Token ids of a text that the model is to continue: as `tokenize` with `add_special`, but never with EOS after it.

        Some files ask for EOS after every text (`add_eos_token`). llama.cpp's own server adds it to prompts as well, so a
        model answers there as if the conversation were over. transformers' chat templates never add it.
        """
        tokens = self.tokenize(text, add_special=True, parse_special=parse_special)
        return tokens[: len(tokens) - self._tokens_after_text]

    @cached_property
    def _tokens_after_text(self) -> int:
        """How many special tokens the model expects after a text."""
        around = self.tokenize("", add_special=True).tolist()
        return len(around) - (self.adds_bos and around[:1] == [self.bos])

    def piece(self, token: int) -> bytes:
        """The bytes of a token, which need not be whole UTF-8 characters; empty for control tokens."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = api.llama_token_to_piece(self.vocab, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def token_text(self, token: int) -> str:
        """A token in the vocabulary's spelling, such as `<|im_end|>`."""
        return (api.llama_vocab_get_text(self.vocab, token) or b"").decode(errors="replace")

    def is_end(self, token: int) -> bool:
        """Whether generation ends with this token."""
        return bool(api.llama_vocab_is_eog(self.vocab, token))


class Context:
    """The KV cache of some sequences, and the compute buffers for their batches; made by `Model.context`."""

    def __init__(
        self,
        model: Model,
        tokens: int,
        sequences: int,
        outputs: int | None,
        kv_type: str,
        threads: int,
        shared: bool,
    ) -> None:
        """Allocate the context; raises SamqError, with llama.cpp's own reason, if memory does not suffice."""
        self.model = model
        self.tokens = tokens
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = allocated_tokens(tokens) * (1 if shared else sequences)
        params.kv_unified = shared
        params.n_ubatch = PHYSICAL_BATCH_TOKENS
        params.n_seq_max = sequences
        params.n_outputs_max = outputs or 0
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = KV_TYPES[kv_type]
        if kv_type == "F32":  # flash attention would round the cache to F16
            params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        with captured_log(errors_only=True) as log:
            handle = api.llama_init_from_model(model._model, params)
        if not handle:
            raise SamqError(
                f"llama.cpp cannot make a context of {tokens} tokens for {sequences} sequences on {model.path.name}: "
                f"{first_error(log())}; use a shorter context"
            )
        self._context: Any = handle
        self._memory = api.llama_get_memory(handle)

    def __enter__(self) -> Self:
        """Return the context itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the context."""
        self.close()

    def close(self) -> None:
        """Free the KV cache and the buffers."""
        if self._context:
            api.llama_free(self._context)
            self._context = None

    def clear(self, *, values: bool = False) -> None:
        """Forget all sequences; with `values`, overwrite the cache with zeros as well.

        llama.cpp masks forgotten values out. A NaN stays NaN under the mask and would spread to the tokens that follow.
        """
        api.llama_memory_clear(self._memory, values)

    def forget(self, sequence: int, start: int = 0) -> bool:
        """Forget one sequence from position `start` on, and free its place in the cache.

        Returns whether llama.cpp could do that: a recurrent state can only be forgotten as a whole.
        """
        return bool(api.llama_memory_seq_rm(self._memory, sequence, start, -1))

    def copy(self, source: int, target: int, tokens: int = -1) -> None:
        """Let sequence `target` start with the first `tokens` tokens of `source` (-1: all)."""
        api.llama_memory_seq_cp(self._memory, source, target, -1, tokens)

    def decode(
        self,
        tokens: ArrayLike,
        positions: ArrayLike,
        sequences: ArrayLike,
        wanted: ArrayLike,
        counts: ArrayLike = 1,
    ) -> NDArray[np.float32]:
        """Append tokens to their sequences, and return the logits of the tokens where `wanted` is true.

        All arguments are 1-D and of one length; `positions` count within each sequence. In a shared context a token may
        belong to several sequences: `counts` gives their number, and `sequences` lists those of each token in turn.
        Returns a view (number of wanted tokens, vocabulary) in the batch's order, which the next call overwrites. Raises
        SamqError if llama.cpp fails.
        """
        token_ids = np.ascontiguousarray(tokens, np.int32)
        count = len(token_ids)
        position_ids = np.ascontiguousarray(np.broadcast_to(positions, count), np.int32)
        sequence_counts = np.ascontiguousarray(np.broadcast_to(counts, count), np.int32)
        sequence_ids = np.ascontiguousarray(np.broadcast_to(sequences, sequence_counts.sum()), np.int32)
        outputs = np.ascontiguousarray(np.broadcast_to(wanted, count), np.int8)
        # llama.cpp takes a list of sequences for each token; the lists are slices of `sequence_ids`
        starts = (sequence_counts.cumsum() - sequence_counts).astype(np.uintp)
        lists = sequence_ids.ctypes.data + sequence_ids.itemsize * starts
        batch = api.llama_batch(
            n_tokens=count,
            token=token_ids.ctypes.data_as(ctypes.POINTER(api.llama_token)),
            pos=position_ids.ctypes.data_as(ctypes.POINTER(api.llama_pos)),
            n_seq_id=sequence_counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            seq_id=lists.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(api.llama_seq_id))),
            logits=outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        self._run(batch)
        shape = (int(outputs.sum()), self.model.vocab_size)
        if shape[0] == 0:
            api.llama_synchronize(self._context)
            return np.empty(shape, np.float32)
        return np.ctypeslib.as_array(api.llama_get_logits(self._context), shape)

    def _run(self, batch: Any) -> None:
        status = api.llama_decode(self._context, batch)
        if status == 1:
            raise SamqError(
                f"a batch of {batch.n_tokens} tokens does not fit into a context of {self.tokens}; use a longer one"
            )
        if status != 0:
            raise SamqError(
                f"llama.cpp failed on a batch of {batch.n_tokens} tokens of {self.model.path} (status {status})"
            )


def allocated_tokens(tokens: int) -> int:
    """The context length that llama.cpp allocates: the next multiple of 256."""
    return -(-tokens // 256) * 256


def is_out_of_memory(errors: Sequence[str]) -> bool:
    """Whether these errors of a failed call say that host or GPU memory did not suffice."""
    return any(_OUT_OF_MEMORY.search(line) for line in errors)


def first_error(errors: Sequence[str]) -> str:
    """The first error of a failed call, which holds the reason; later ones only report the failure."""
    return errors[0].strip() if errors else "no reason given"
