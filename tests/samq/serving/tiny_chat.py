"""Tiny models that can be served: random weights, a vocabulary of single bytes, a chat template."""

import gguf
import numpy as np

from tests.conftest import write_tiny_gguf

TEMPLATE = (
    "{% for m in messages %}{% if '!' in m.content %}{{ raise_exception('no shouting') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
)
CONTEXT = 8192
END = ("</s>", gguf.TokenType.CONTROL)


def add_byte_vocabulary(writer, template, add_eos=False, end=END):
    """A SentencePiece vocabulary that can spell everything, a byte a token."""
    pieces = ["<unk>", "<s>", end[0], *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]  # the last is a space
    kinds = gguf.TokenType
    types = [kinds.UNKNOWN, kinds.CONTROL, end[1], *[kinds.BYTE] * 256, kinds.NORMAL]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * len(pieces))
    writer.add_token_types([int(kind) for kind in types])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(add_eos)
    writer.add_add_space_prefix(False)
    if template:
        writer.add_chat_template(template)


def write_chat_gguf(path, *, seed=0, context=CONTEXT, template=TEMPLATE, spread=0.2, add_eos=False, end=END, **shape):
    return write_tiny_gguf(
        path,
        width=128,
        hidden=128,
        vocabulary=260,
        spread=spread,
        seed=seed,
        context=context,
        rare=[0, 1, 2],  # an answer is text, and goes on until its limit
        add_tokenizer=lambda writer: add_byte_vocabulary(writer, template, add_eos, end),
        **shape,
    )


def write_silent_gguf(path):
    """A model whose weights are not numbers."""
    return write_tiny_gguf(
        path, vocabulary=260, spread=np.nan, add_tokenizer=lambda writer: add_byte_vocabulary(writer, None)
    )
