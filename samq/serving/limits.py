"""Checks a request's body before the engine sees it: what would end the engine, or occupy it for minutes.

llama.cpp follows all possible matches of a grammar at once, for all clients, and cannot be interrupted meanwhile. Its
tokenizers recurse once for each character of a match.
"""

import re
from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json, to_json

from samq.errors import TextError
from samq.llamacpp.grammar_cost import BACKWARDS, MOST_WORK, TOO_LARGE, UnusableGrammar, counts_backwards, grammar_cost
from samq.llamacpp.schema_cost import schema_cost
from samq.llamacpp.tokenizing import stack_bytes
from samq.serving.refusal import Refused
from samq.serving.settings import ServingSettings

STACK_BYTES = 64 * 2**20  # of each of the engine's threads
_MOST_VALUES = (
    300_000  # commas and brackets of a body, in texts too: counted in 1 ms, while parsing so many takes 30 ms
)
_MOST_KEYS = 5000  # of one object: llama-server's time grows with their square, 25 s for 60,000
_MOST_REPETITIONS = 1000  # llama.cpp itself refuses more than 2000
_MOST_MATCHES = 1000  # at once: they take 0.3 s a token with a vocabulary of 49,000
_MOST_ELEMENTS = 1_000_000  # of a written-out grammar: 25 MB of memory
_LONG_TEXT = 4096  # characters; shorter ones need no stack worth counting
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
_GRAMMARS = ("response_format", "json_schema", "grammar", "tools", "functions", "text")  # fields that become a grammar
_SCHEMAS = ("schema", "parameters", "input_schema")  # fields in them that hold a JSON schema
_INTERNAL = ("chat_format", "chat_parser", "grammar_lazy", "grammar_triggers", "grammar_type", "preserved_tokens")
_MOST_NAMES = {"samplers": 16, "dry_sequence_breakers": 16}  # each costs passes over the vocabulary
_LONGEST_NAME = 40  # characters; llama.cpp cuts longer breakers
_MOST = {
    **dict.fromkeys(("repeat_last_n", "dry_penalty_last_n"), 2**20),  # llama.cpp allocates so many tokens at once
    **dict.fromkeys(("n_probs", "logprobs", "top_logprobs"), 1000),  # sorted, and sent, for each token
}
_SIMPLER = (
    "let alternatives differ in their first required property, and use fewer optional parts and enumerated values"
)


def read_body(body: bytes, settings: ServingSettings, vocabulary: tuple[str, str]) -> tuple[dict[str, Any], bytes]:
    """The fields of a body, and the body to pass on; raises Refused (400, 413). May be called in a thread.

    `vocabulary` is the model's `tokenizer.ggml.model` and `tokenizer.ggml.pre`. Fields of messages that are null are left
    out: a client may send the server's own message back, and to llama-server null is no text.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise Refused(
            413,
            f"the body has more than {_MOST_VALUES} commas and opening brackets, those in texts included; send less",
            code="too_many_values",
        )
    try:
        fields = from_json(body.removeprefix(b"\xef\xbb\xbf"), allow_inf_nan=False)
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}; send a JSON object", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise Refused(400, "the body is not a JSON object; send one", code="invalid_json")
    _check_values(fields, vocabulary)
    _check_messages(fields, settings)
    _check_sampling(fields)
    _check_grammars({name: fields[name] for name in _GRAMMARS if fields.get(name)}, settings.max_schema_bytes)
    return fields, _without_nulls(fields, body)


def _check_values(fields: dict[str, Any], vocabulary: tuple[str, str]) -> None:
    for node in _nodes(fields):
        if isinstance(node, dict) and len(node) > _MOST_KEYS:
            raise Refused(
                413,
                f"an object has {len(node)} fields, and the limit is {_MOST_KEYS}; send fewer",
                code="too_many_values",
            )
        if isinstance(node, str) and len(node) > _LONG_TEXT:
            try:
                stack = stack_bytes(node, *vocabulary)
            except TextError as error:
                raise Refused(400, str(error), code="invalid_text") from error
            if stack > STACK_BYTES:
                raise Refused(
                    400,
                    f"a text has {stack // 1024} characters without a break, and the limit is {STACK_BYTES // 1024}; break "
                    "it with white space, or shorten it",
                    code="invalid_text",
                )


def _check_messages(fields: dict[str, Any], settings: ServingSettings) -> None:
    parts = 0
    for name in ("messages", "input", "prompt", "stop", "documents"):
        items = [one for one in _list(fields.get(name)) if not isinstance(one, int)]
        if len(items) > settings.max_messages:
            raise _too_many(name, len(items), settings.max_messages)
        for message in items:
            content = _list(message.get("content")) if isinstance(message, dict) else []
            parts += len(content)
            for part in content if len(content) <= settings.max_parts else []:
                _check_media(part, name)
    if parts > settings.max_parts:
        raise _too_many("content parts", parts, settings.max_parts)


def _check_media(part: Any, param: str) -> None:
    """llama-server would fetch what a URL names, from wherever the server may go."""
    for name in ("image_url", "input_audio", "input_video"):
        source = part.get(name) if isinstance(part, dict) else None
        url = source.get("url") if isinstance(source, dict) else source
        if isinstance(url, str) and re.match(r"\w+://", url):
            reason = f"{name}: the server fetches nothing; send the data itself, as a data: URL"
            raise Refused(400, reason, code="invalid_url", param=param)


def _check_sampling(fields: dict[str, Any]) -> None:
    """llama-server prepares a request's sampling in its only loop, for all clients."""
    for name in _INTERNAL:
        if name in fields:
            raise Refused(400, f"{name}: the engine sets it itself; leave it out", code="invalid_value", param=name)
    for name, most in _MOST_NAMES.items():
        names = fields.get(name)
        if names is None:
            continue
        if not isinstance(names, str | list):
            raise Refused(400, f"{name}: send a list of texts", code="invalid_value", param=name)
        if len(names) > most or any(isinstance(one, str) and len(one) > _LONGEST_NAME for one in names):
            reason = f"{name}: it may have {most} texts of {_LONGEST_NAME} characters; send fewer or shorter ones"
            raise Refused(400, reason, code="too_many", param=name)
    for name, limit in _MOST.items():
        number = fields.get(name)
        if isinstance(number, int | float) and number > limit:
            raise Refused(400, f"{name}: it is {number}, and the limit is {limit}", code="invalid_value", param=name)


def _check_grammars(grammars: dict[str, Any], most_bytes: int) -> None:
    """Raise Refused if schemas and grammars are too long together, or if one would take too much of the engine's time."""
    size = elements = work = 0
    for name, grammar in grammars.items():
        size += len(to_json(grammar))
        if size > most_bytes:
            raise _unusable(name, f"it has {size} bytes, and the limit is {most_bytes}")
        for node in _nodes(grammar):
            if not isinstance(node, dict):
                continue
            for count in map(node.get, _COUNTS):
                if isinstance(count, int | float) and abs(count) > _MOST_REPETITIONS:
                    raise _unusable(name, f"it asks for {count} repetitions, and the limit is {_MOST_REPETITIONS}")
            if repeats_backwards(node):
                raise _unusable(name, BACKWARDS)
        try:
            costs = [grammar_cost(grammar)] if isinstance(grammar, str) else map(schema_cost, _schemas(name, grammar))
            for cost in costs:
                if cost.matches > _MOST_MATCHES:
                    raise _unusable(name, f"a text can match it in over {_MOST_MATCHES} ways at once; {_SIMPLER}")
                elements += cost.elements
                work += cost.work
                if work > MOST_WORK:
                    raise _unusable(name, TOO_LARGE)
        except UnusableGrammar as error:
            raise _unusable(name, str(error)) from error
        if elements > _MOST_ELEMENTS:
            raise _unusable(name, f"written out, its repetitions have over {_MOST_ELEMENTS} elements; ask for fewer")


def _schemas(name: str, value: Any) -> Iterator[Any]:
    """The JSON schemas in a field, each as a whole: `$ref`s start at its root."""
    if name == "json_schema":
        yield value
        return
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting += node
        elif isinstance(node, dict):
            for key, inner in node.items():
                if key in _SCHEMAS and isinstance(inner, dict):
                    yield inner
                else:
                    waiting.append(inner)


def repeats_backwards(schema: dict[str, Any]) -> bool:
    """Whether a minimum of repetitions exceeds its maximum: llama.cpp would fill the memory with them."""
    if isinstance(pattern := schema.get("pattern"), str) and counts_backwards(pattern):
        return True
    pairs = [(schema.get(f"min{what}"), schema.get(f"max{what}")) for what in ("Items", "Length")]
    return any(isinstance(least, int) and isinstance(most, int) and least > most for least, most in pairs)


def _nodes(value: Any) -> Iterator[Any]:
    """A JSON value and all inside it."""
    waiting = [value]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, dict):
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def _without_nulls(fields: dict[str, Any], body: bytes) -> bytes:
    changed = False
    for message in _list(fields.get("messages")):
        if isinstance(message, dict):
            for key in [key for key, value in message.items() if value is None and key != "content"]:
                del message[key]
                changed = True
    return to_json(fields) if changed else body


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _too_many(what: str, count: int, most: int) -> Refused:
    return Refused(400, f"{what}: there are {count}, and the limit is {most}; send fewer", code="too_many", param=what)


def _unusable(param: str, reason: str) -> Refused:
    return Refused(400, f"cannot use {param}: {reason}", code="invalid_json_schema", param=param)
