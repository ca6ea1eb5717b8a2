"""Choice of the next token with llama.cpp's samplers, and a grammar in front of them."""

import ctypes
from typing import Any, Self

import llama_cpp.llama_cpp as api
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from samq.llamacpp.runtime import Context, Model, captured_log, first_error
from samq.serving.refusal import Refused

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class SamplerSettings(BaseModel):
    """Settings of llama.cpp's samplers. The defaults are OpenAI's: the model's own distribution."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    temperature: float = 1.0  # 0: the most probable token
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    grammar: str | None = None  # GBNF


class Sampler:
    """llama.cpp's samplers for one answer; a context manager, which frees them."""

    def __init__(self, model: Model, settings: SamplerSettings, context_tokens: int) -> None:
        """`context_tokens`: how far back penalties look. Raises Refused (400) for a grammar that llama.cpp cannot read."""
        self._model = model
        self._grammar = _make_grammar(model, settings.grammar) if settings.grammar else None
        self._chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        for stage in _stages(settings, model.vocab_size, context_tokens):
            api.llama_sampler_chain_add(self._chain, stage)

    def __enter__(self) -> Self:
        """Return the sampler itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free what llama.cpp allocated."""
        api.llama_sampler_free(self._chain)
        if self._grammar:
            api.llama_sampler_free(self._grammar)

    def sample(self, context: Context) -> int:
        """The next token, given the context's last logits.

        Raises Refused (400) if the grammar allows no token of the vocabulary, or if the samplers choose a token that it does
        not allow, as a penalty can produce NaN. llama.cpp would end the process.
        """
        if not self._grammar:
            return context.sample(self._chain)
        logits = context.last_logits()
        # As llama.cpp's own programs do: the grammar mostly allows the choice, and checking one token is cheap.
        token = self._choose(_candidates(logits))
        if not self._allows(token):
            candidates = _candidates(logits)
            self._apply(self._grammar, candidates)
            if not np.isfinite(candidates["logit"]).any():
                raise Refused(
                    400,
                    "the model's vocabulary has no token that the response format allows next",
                    code="unsatisfiable_response_format",
                    param="response_format",
                )
            token = self._choose(candidates)
            if not self._allows(token):
                raise Refused(
                    400,
                    "the penalties and the temperature leave no choice among the tokens that the response format allows",
                    code="unsatisfiable_response_format",
                    param="response_format",
                )
        api.llama_sampler_accept(self._chain, token)
        if not self._model.is_end(token):
            api.llama_sampler_accept(self._grammar, token)
        return token

    def _choose(self, candidates: NDArray[Any]) -> int:
        chosen = self._apply(self._chain, candidates)
        return int(chosen.data[chosen.selected].id)

    def _allows(self, token: int) -> bool:
        one = np.array([(token, 0.0, 0.0)], _CANDIDATE)
        self._apply(self._grammar, one)
        return bool(np.isfinite(one["logit"][0]))

    def _apply(self, sampler: Any, candidates: NDArray[Any]) -> Any:
        data = ctypes.cast(candidates.ctypes.data, api.llama_token_data_p)
        array = api.llama_token_data_array(data=data, size=len(candidates), selected=-1, sorted=False)
        api.llama_sampler_apply(sampler, ctypes.byref(array))
        return array


def check_grammar(model: Model, grammar: str) -> None:
    """Raises Refused (400) if llama.cpp cannot read it."""
    api.llama_sampler_free(_make_grammar(model, grammar))


def _make_grammar(model: Model, grammar: str) -> Any:
    with captured_log(errors_only=True) as log:
        sampler = api.llama_sampler_init_grammar(model.vocab, grammar.encode(), b"root")
    if not sampler:
        raise Refused(
            400,
            f"llama.cpp cannot use the response format: {first_error(log())}",
            code="invalid_grammar",
            param="response_format",
        )
    return sampler


def _stages(settings: SamplerSettings, vocab_size: int, context_tokens: int) -> list[Any]:
    """The samplers that have an effect with these settings, in llama.cpp's order."""
    stages = []
    penalties = (settings.repeat_penalty, settings.frequency_penalty, settings.presence_penalty)
    if penalties != (1.0, 0.0, 0.0):
        stages.append(api.llama_sampler_init_penalties(vocab_size, context_tokens, *penalties))
    if settings.temperature == 0:
        return [*stages, api.llama_sampler_init_greedy()]
    if settings.top_k:
        stages.append(api.llama_sampler_init_top_k(settings.top_k))
    if settings.top_p < 1:
        stages.append(api.llama_sampler_init_top_p(settings.top_p, 1))
    if settings.min_p > 0:
        stages.append(api.llama_sampler_init_min_p(settings.min_p, 1))
    if settings.temperature != 1:
        stages.append(api.llama_sampler_init_temp(settings.temperature))
    # The remainder is never LLAMA_DEFAULT_SEED (2^32 - 1), which makes llama.cpp choose a random seed.
    return [*stages, api.llama_sampler_init_dist(settings.seed % api.LLAMA_DEFAULT_SEED)]


def _candidates(logits: NDArray[np.float32]) -> NDArray[Any]:
    candidates = np.zeros(len(logits), _CANDIDATE)
    candidates["id"] = np.arange(len(logits))
    candidates["logit"] = logits
    return candidates
