"""Chats as text, by the model's own template: what transformers makes of it, but for the date.

Templates that tell the model the date always tell it the same day, so that answers do not depend on it.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from samq.errors import SamqError
from samq.evaluation.llama import Model

Message = Mapping[str, str]
_CUT = "END-OF-THE-LAST-MESSAGE "  # transformers' way to find where it ends: the space shows whether spaces are kept


def render_chat(model: Model, messages: Sequence[Message], *, continue_last: bool = False) -> str:
    """The text of `messages` (role and content each), up to where the model's answer begins.

    With `continue_last` it ends with the last message's content, for the model to go on with. A template that refuses
    a system message gets the chat without it. Raises SamqError if the model has no template, or it refuses the chat.
    """
    if model.chat_template is None:
        raise SamqError(f"{model.path} has no chat template; evaluate it without one")
    shown = [dict(message) for message in messages]
    if continue_last:
        shown[-1]["content"] += _CUT
    bos, eos = ("" if token is None else model.token_text(token) for token in (model.bos, model.eos))
    formatter = _formatter(model.chat_template, bos, eos, not continue_last)
    try:
        text = _format(formatter, shown)
    except (TemplateError, ValueError) as error:
        raise SamqError(f"the chat template of {model.path} refuses a chat: {error}; evaluate without it") from error
    if not continue_last:
        return text
    text, found, rest = text.rpartition(_CUT.strip())
    if not found:
        raise SamqError(f"the chat template of {model.path} drops the last message; evaluate without it")
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
def _formatter(template: str, bos: str, eos: str, add_generation_prompt: bool) -> Jinja2ChatFormatter:
    return _DatelessFormatter(template, eos, bos, add_generation_prompt)


class _DatelessFormatter(Jinja2ChatFormatter):
    @staticmethod
    def strftime_now(f: str) -> str:
        return datetime(2024, 7, 26).strftime(f)
