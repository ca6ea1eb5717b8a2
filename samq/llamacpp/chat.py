"""Chats as text and tokens, by the model's own chat template, as transformers renders it except for the date.

Some templates tell the model the date. Measurements always use the same day, so that answers do not depend on it.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import numpy as np
from jinja2 import TemplateError
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from numpy.typing import NDArray

from samq.errors import SamqError
from samq.llamacpp.runtime import Model

ChatMessage = Mapping[str, str]
# Marks the end of the last message, as in transformers. The space shows whether the template keeps trailing spaces.
_CUT = "END-OF-THE-LAST-MESSAGE "


def tokenize_chat(model: Model, messages: Sequence[ChatMessage], *, dated: bool = False) -> NDArray[np.int32]:
    """Token ids of `messages`, up to where the model's answer begins; see `render_chat`."""
    text = render_chat(model, messages, dated=dated)
    if model.adds_bos and model.bos is not None:
        text = text.removeprefix(model.token_text(model.bos))  # the tokenizer adds it
    return model.tokenize(text, add_special=True, parse_special=True)


def render_chat(
    model: Model, messages: Sequence[ChatMessage], *, continue_last: bool = False, dated: bool = False
) -> str:
    """The text of `messages` (each with role and content), up to where the model's answer begins.

    With `continue_last` the text ends with the content of the last message, and the model continues it. If the template
    refuses a system message, the text leaves that message out. `dated`: with today's date if the template asks for one.
    Raises SamqError if the model has no template, or if the template refuses the chat.
    """
    if model.chat_template is None:
        raise SamqError(f"{model.path} has no chat template; use it without one")
    turns = [dict(message) for message in messages]
    if continue_last:
        turns[-1]["content"] += _CUT
    bos, eos = ("" if token is None else model.token_text(token) for token in (model.bos, model.eos))
    formatter = _formatter(model.chat_template, bos, eos, not continue_last, dated)
    try:
        text = _format(formatter, turns)
    except (TemplateError, ValueError) as error:
        raise SamqError(
            f"the chat template of {model.path} refuses a chat: {error}; leave out the template or that message"
        ) from error
    if not continue_last:
        return text
    text, mark, rest = text.rpartition(_CUT.strip())
    if not mark:
        raise SamqError(f"the chat template of {model.path} drops the last message; evaluate without the template")
    return text if rest.startswith(" ") else text.rstrip()


def _format(formatter: Jinja2ChatFormatter, messages: list[Any]) -> str:
    try:
        return formatter(messages=messages).prompt
    except (TemplateError, ValueError):
        others = [message for message in messages if message["role"] != "system"]
        if len(others) == len(messages):
            raise
        return formatter(messages=others).prompt


@lru_cache
def _formatter(template: str, bos: str, eos: str, add_generation_prompt: bool, dated: bool) -> Jinja2ChatFormatter:
    formatter = Jinja2ChatFormatter if dated else _FixedDateFormatter
    return formatter(template, eos, bos, add_generation_prompt)


class _FixedDateFormatter(Jinja2ChatFormatter):
    @staticmethod
    def strftime_now(f: str) -> str:
        return datetime(2024, 7, 26).strftime(f)
