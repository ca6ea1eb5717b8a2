"""A model's chat template: turns of a conversation -> token ids."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from numpy.typing import NDArray

from samq.errors import SamqError
from samq.evaluation.llama import Model


class ChatTemplate:
    """The Jinja template that a GGUF carries, compiled once."""

    def __init__(self, model: Model, formatter: type[Jinja2ChatFormatter] = Jinja2ChatFormatter) -> None:
        """Raises SamqError if the model has none."""
        if model.chat_template is None:
            raise SamqError(f"{model.path.name} has no chat template; use plain completions")
        bos, eos = ("" if token is None else model.token_text(token) for token in (model.bos, model.eos))
        self._formatter = formatter(model.chat_template, eos_token=eos, bos_token=bos)
        self._model = model
        self._doubled_bos = bos if model.adds_bos else ""  # the tokenizer adds it

    def tokenize(self, turns: Sequence[Any]) -> NDArray[np.int32]:
        """Token ids of the turns ({"role": ..., "content": ...}), up to where the answer begins.

        Raises whatever the template raises: templates refuse turns that they do not know.
        """
        text = self._formatter(messages=list(turns)).prompt.removeprefix(self._doubled_bos)
        return self._model.tokenize(text, add_special=True, parse_special=True)
