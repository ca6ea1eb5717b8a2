"""Chats as text and tokens, by the model's own chat template, as transformers renders it except for the date.

Some templates tell the model the date. Measurements always use the same day, so that answers do not depend on it.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from numpy.typing import NDArray

from samq.errors import SamqError
from samq.llamacpp.runtime import Model

ChatMessage = Mapping[str, str]
Turns = list[dict[str, str]]
# Marks the end of the last message, as in transformers. The space shows whether the template keeps trailing spaces.
_CUT = "END-OF-THE-LAST-MESSAGE "
_MARK = "xMARKx"  # with a number after it, appended to a message to see whether the template renders that message


class ChatError(SamqError):
    """The model's chat template cannot render these messages; `reason` says why, without the model's name."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"the chat template of {path} {reason}; leave out the template or that message")
        self.reason = reason


def tokenize_chat(model: Model, messages: Sequence[ChatMessage], *, dated: bool = False) -> NDArray[np.int32]:
    """Token ids of `messages`, up to where the model's answer begins; see `render_chat`."""
    text = render_chat(model, messages, dated=dated)
    if model.adds_bos and model.bos is not None:
        text = text.removeprefix(model.token_text(model.bos))  # the tokenizer adds it
    return model.tokenize_prompt(text, parse_special=True)


def render_chat(
    model: Model, messages: Sequence[ChatMessage], *, continue_last: bool = False, dated: bool = False
) -> str:
    """The text of `messages` (each with role and content), up to where the model's answer begins.

    With `continue_last` the text ends with the content of the last message, and the model continues it. If the template
    refuses or drops a system message, the text has it at the beginning of the next user message. `dated`: with today's
    date if the template asks for one. Raises SamqError if the model has no template, and ChatError if the template refuses
    the chat or drops one of its messages.
    """
    if model.chat_template is None:
        raise SamqError(f"{model.path} has no chat template; use it without one")
    turns = [dict(message) for message in messages]
    if continue_last:
        turns[-1]["content"] += _CUT
    bos, eos = ("" if token is None else model.token_text(token) for token in (model.bos, model.eos))
    text = _render_whole(model.path, _formatter(model.chat_template, bos, eos, not continue_last, dated), turns)
    if not continue_last:
        return text
    text, mark, rest = text.rpartition(_CUT.strip())
    if not mark:
        raise SamqError(f"the chat template of {model.path} drops the last message; evaluate without the template")
    return text if rest.startswith(" ") else text.rstrip()


def _render_whole(path: Path, formatter: Jinja2ChatFormatter, turns: Turns) -> str:
    """The text of all turns, with none left out; raises ChatError with the reason for the turns as they are."""
    reasons: list[str] = []
    for attempt in _attempts(turns):
        try:
            text: str = formatter(messages=attempt).prompt  # type: ignore[arg-type]
        except Exception as error:  # a template can raise anything
            reasons.append(f"refuses a chat: {_first_line(error)}")
            continue
        dropped = _dropped(formatter, attempt)
        if not dropped:
            return text
        reasons.append(f"drops message {dropped[0] + 1}, of the role {attempt[dropped[0]]['role']}")
    raise ChatError(path, reasons[0])


def _attempts(turns: Turns) -> Iterator[Turns]:
    """The turns as they are; with the later system messages in user messages; with all system messages there."""
    yield turns
    systems = [index for index, turn in enumerate(turns) if turn["role"] == "system"]
    if later := [index for index in systems if index > 0]:
        yield _without_system(turns, later)
    if systems and systems != later:
        yield _without_system(turns, systems)


def _without_system(turns: Turns, merged: Sequence[int]) -> Turns:
    """The turns with the system messages at these indices put before the next user message, as llama.cpp does it.

    A user message of its own holds them if no user message follows at once.
    """
    result: Turns = []
    waiting: list[str] = []
    for index, turn in enumerate(turns):
        if index in merged:
            waiting.append(turn["content"])
        elif waiting and turn["role"] == "user":
            result.append({**turn, "content": "\n".join([*waiting, turn["content"]])})
            waiting = []
        else:
            result += [{"role": "user", "content": "\n".join(waiting)}] if waiting else []
            waiting = []
            result.append(turn)
    return result + ([{"role": "user", "content": "\n".join(waiting)}] if waiting else [])


def _dropped(formatter: Jinja2ChatFormatter, turns: Turns) -> list[int]:
    """Indices of the turns that have content and do not show in the text."""
    marks = [f"{_MARK}{index}x" for index in range(len(turns))]
    marked = [{**turn, "content": turn["content"] + mark} for turn, mark in zip(turns, marks, strict=True)]
    try:
        text = formatter(messages=marked).prompt  # type: ignore[arg-type]
    except Exception:  # it demands a form that the marks break
        return []
    return [index for index, turn in enumerate(turns) if turn["content"].strip() and marks[index] not in text]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__


@lru_cache
def _formatter(template: str, bos: str, eos: str, add_generation_prompt: bool, dated: bool) -> Jinja2ChatFormatter:
    formatter = Jinja2ChatFormatter if dated else _FixedDateFormatter
    return formatter(template, eos, bos, add_generation_prompt)


class _FixedDateFormatter(Jinja2ChatFormatter):
    @staticmethod
    def strftime_now(f: str) -> str:
        return datetime(2024, 7, 26).strftime(f)
