"""The answers of OpenAI's API: whole ones, and the chunks of streams."""

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from samq.serving.engine import Delta, Finished
from samq.serving.logprobs import Alternative, TokenLogprob


class Shape(Protocol):
    """The format of one endpoint's answers."""

    def whole(self, delta: Delta, finished: Finished) -> dict[str, Any]:
        """The body of an answer that is not streamed."""

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """The chunks of a stream for more text."""

    def last(self, finished: Finished) -> dict[str, Any]:
        """The chunk of a stream at the end of the text."""

    def usage(self, finished: Finished) -> dict[str, Any]:
        """The chunk after the last, if the client asked for the token counts."""


class CompletionShape:
    """`text_completion`."""

    def __init__(self, model: str, logprobs: bool) -> None:
        """`logprobs`: whether the client asked for them."""
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._logprobs = logprobs
        self._offset = 0  # characters of the answer so far

    def whole(self, delta: Delta, finished: Finished) -> dict[str, Any]:
        """See `Shape`."""
        return {**self._body(delta, finished.reason), "usage": usage(finished)}

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """See `Shape`."""
        return [self._body(delta, None)]

    def last(self, finished: Finished) -> dict[str, Any]:
        """See `Shape`."""
        return self._body(Delta(""), finished.reason)

    def usage(self, finished: Finished) -> dict[str, Any]:
        """See `Shape`."""
        return {**self._head, "object": "text_completion", "choices": [], "usage": usage(finished)}

    def _body(self, delta: Delta, reason: str | None) -> dict[str, Any]:
        logprobs = self._words(delta.logprobs) if self._logprobs else None
        choice = {"index": 0, "text": delta.text, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": "text_completion", "choices": [choice]}

    def _words(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        texts = [_text(token.bytes) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{_text(other.bytes): other.logprob for other in token.top} for token in tokens],
            "text_offset": offsets,
        }


class ChatShape:
    """`chat.completion`."""

    def __init__(self, model: str, logprobs: bool) -> None:
        """`logprobs`: whether the client asked for them."""
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._logprobs = logprobs
        self._begun = False

    def whole(self, delta: Delta, finished: Finished) -> dict[str, Any]:
        """See `Shape`."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": self._words(delta),
            "finish_reason": finished.reason,
        }
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage(finished)}

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """See `Shape`."""
        return [*self._role(), self._chunk({"content": delta.text}, self._words(delta), None)]

    def last(self, finished: Finished) -> dict[str, Any]:
        """See `Shape`."""
        content = {} if self._begun else {"role": "assistant", "content": ""}
        return self._chunk(content, None, finished.reason)

    def usage(self, finished: Finished) -> dict[str, Any]:
        """See `Shape`."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(finished)}

    def _role(self) -> list[dict[str, Any]]:
        if self._begun:
            return []
        self._begun = True
        return [self._chunk({"role": "assistant", "content": ""}, None, None)]

    def _chunk(self, content: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": content, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _words(self, delta: Delta) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {
            "content": [{**_entry(token), "top_logprobs": list(map(_entry, token.top))} for token in delta.logprobs],
            "refusal": None,
        }


def usage(finished: Finished) -> dict[str, Any]:
    """Token counts: tokens, not characters or chunks."""
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens},
    }


def _entry(token: TokenLogprob | Alternative) -> dict[str, Any]:
    return {"token": _text(token.bytes), "logprob": token.logprob, "bytes": list(token.bytes)}


def _text(piece: bytes) -> str:
    return piece.decode(errors="replace")
