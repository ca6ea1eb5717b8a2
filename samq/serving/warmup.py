"""Asks an engine by itself: the warm-up that a new model must pass, and the shadow check of recent prompts."""

import json
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from samq.errors import SamqError
from samq.serving.child import Child, LostError
from samq.serving.engine import other_use
from samq.serving.settings import ServingSettings

logger = logging.getLogger(__name__)

_REPEATED = 8  # an answer of one token repeated so often is not sane
_KEPT = ("messages", "prompt", "tools", "chat_template_kwargs", "response_format")
Prompt = tuple[str, dict[str, Any]]  # the path, and what of the body makes the prompt


class Unfit(SamqError):
    """The model loads, but must not serve; loading it again would not help."""


class RefusedPromptError(SamqError):
    """The engine answered a prompt with an error."""


class RecentPrompts:
    """The newest prompts, in memory only."""

    def __init__(self, count: int) -> None:
        """Keep at most `count` prompts."""
        self._prompts: deque[Prompt] = deque(maxlen=count)

    def add(self, path: str, fields: Mapping[str, Any]) -> None:
        """Add the prompt of a request for a completion, and drop the oldest if there are too many."""
        if self._prompts.maxlen and path.endswith("/completions"):
            self._prompts.append((path, {name: fields[name] for name in _KEPT if name in fields}))

    def newest(self) -> list[Prompt]:
        """The kept prompts, oldest first."""
        return list(self._prompts)


async def warm_up(child: Child, name: str, settings: ServingSettings) -> None:
    """Let the model answer a prompt; raises Unfit for an error, for no text, or for one repeated token."""
    prompt = {"messages": [{"role": "user", "content": settings.warmup_prompt}]}
    try:
        if other := other_use(settings):
            fields = {"input": settings.warmup_prompt, "query": settings.warmup_prompt, "documents": ["red", "blue"]}
            async with child.ask(other, json.dumps(fields).encode()) as answer:
                if answer.status != 200:
                    raise _insane(name, _message(await answer.read()))
            return
        pieces = await greedy(child, ("/v1/chat/completions", prompt), settings.warmup_tokens)
    except RefusedPromptError as error:
        raise _insane(name, str(error)) from error
    except LostError as error:
        raise SamqError(f"{name}: the engine {child.end} at the warm-up prompt") from error
    text = "".join(pieces)
    if not text.strip():
        raise _insane(name, "the answer is empty")
    if len(pieces) >= _REPEATED and len(set(pieces)) == 1:
        raise _insane(name, f"the answer {text[:40]!r} repeats one token")
    logger.info("%s answers the warm-up prompt: %r", name, text[:80])


async def token_agreement(old: Child, new: Child, prompts: Sequence[Prompt], tokens: int) -> float | None:
    """Share of tokens that two models agree on, with greedy decoding and up to their first difference in each answer.

    It is the mean over prompts of (length of the common prefix / length of the longer answer). It is None if no prompt can be
    answered by both. Answers are compared as texts, so the two models may have different vocabularies.
    """
    shares = []
    for prompt in prompts:
        try:
            first, second = [await greedy(model, prompt, tokens) for model in (old, new)]
        except RefusedPromptError:
            continue
        longest = max(len(first), len(second))
        pairs = zip(first, second, strict=False)
        same = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
        shares.append(same / longest if longest else 1.0)
    return sum(shares) / len(shares) if shares else None


async def greedy(child: Child, prompt: Prompt, tokens: int) -> list[str]:
    """The texts of a greedy answer's events, a token each; raises RefusedPromptError, and LostError."""
    path, fields = prompt
    body = {**fields, "temperature": 0, "max_tokens": tokens, "stream": True}
    text = b""
    async with child.ask(path, json.dumps(body).encode()) as answer:
        async for piece in child.heard(answer):
            text += piece
        if answer.status != 200:
            raise RefusedPromptError(_message(text))
    pieces = []
    for line in text.splitlines():
        if line.startswith(b"data: {"):
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise RefusedPromptError(_message(line.removeprefix(b"data: ")))
            for choice in event.get("choices", ()):
                delta = choice.get("delta", {})
                pieces.append(choice.get("text") or delta.get("content") or delta.get("reasoning_content") or "")
    return [piece for piece in pieces if piece]


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body.decode(errors="replace")[:200]


def _insane(name: str, reason: str) -> Unfit:
    return Unfit(f"{name} does not answer the warm-up prompt sanely: {reason}; evaluate it before promoting it")
