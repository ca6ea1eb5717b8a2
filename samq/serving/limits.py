"""Checks a request's body before the engine sees it: size, numbers of things, and what would occupy the engine for minutes.

llama.cpp follows all possible matches of a grammar at once, for all clients, and cannot be interrupted meanwhile.
"""

import re
from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json, to_json

from samq.serving.refusal import Refused
from samq.serving.settings import ServingSettings

_MOST_VALUES = (
    300_000  # commas and brackets of a body, in texts too: counted in 1 ms, while parsing so many takes 30 ms
)
_MOST_REPETITIONS = 1000  # llama.cpp itself refuses more than 2000
_MOST_CHOICES = 100  # of a pattern: `^(a?|b?){99}$` has 297, and takes llama.cpp minutes a token
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
_PATTERN_TOKEN = re.compile(r"\\.|\[(?:\\.|[^\]])*\]|\{(?P<count>[^}]*)\}|.", re.DOTALL)


def read_body(body: bytes, settings: ServingSettings) -> tuple[dict[str, Any], bytes]:
    """The fields of a body, and the body to pass on; raises Refused (400, 413). May be called in a thread.

    Fields of messages that are null are left out, as a client sends the server's own message back: to llama-server, null
    is no text.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise Refused(413, f"the body has more than {_MOST_VALUES} values; send less", code="too_many_values")
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}; send a JSON object", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise Refused(400, "the body is not a JSON object; send one", code="invalid_json")
    _check_numbers(fields, settings)
    _check_media(fields)
    _check_grammars(fields, settings.max_schema_bytes)
    return fields, _without_nulls(fields, body)


def _messages(fields: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        message
        for name in ("messages", "input")
        for message in _list(fields.get(name))
        if isinstance(message, dict)
    ]  # fmt: skip


def _check_numbers(fields: dict[str, Any], settings: ServingSettings) -> None:
    for name in ("messages", "input", "prompt", "stop"):
        found = [one for one in _list(fields.get(name)) if not isinstance(one, int)]
        if len(found) > settings.max_messages:
            raise _too_many(name, len(found), settings.max_messages)
    parts = sum(len(_list(message.get("content"))) for message in _messages(fields))
    if parts > settings.max_parts:
        raise _too_many("content parts", parts, settings.max_parts)


def _check_media(fields: dict[str, Any]) -> None:
    """llama-server would fetch what a URL names, from wherever the server may go."""
    for message in _messages(fields):
        for part in _list(message.get("content")):
            for name in ("image_url", "input_audio", "input_video"):
                source = part.get(name) if isinstance(part, dict) else None
                url = source.get("url") if isinstance(source, dict) else source
                if isinstance(url, str) and re.match(r"\w+://", url):
                    raise Refused(
                        400,
                        f"{name}: the server fetches nothing; send the data itself, as a data: URL",
                        code="invalid_url",
                        param="messages",
                    )


def _check_grammars(fields: dict[str, Any], most_bytes: int) -> None:
    """Raise Refused if schemas and grammars are too long together, or if one has too many repetitions or choices."""
    found = dict(_schemas(fields))
    size = sum(len(to_json(schema)) for schema in found.values())
    if size > most_bytes:
        raise _unusable(next(iter(found)), f"it has {size} bytes, and the limit is {most_bytes}")
    for param, schema in found.items():
        _check_repetitions(schema, param)


def _schemas(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(field, schema or grammar) of everything that llama-server makes a grammar of."""
    for name in ("response_format", "json_schema", "guided_json", "grammar", "tools", "functions", "text"):
        if fields.get(name):
            yield name, fields[name]


def _check_repetitions(node: Any, param: str) -> None:
    if isinstance(node, dict):
        for key in _COUNTS:
            count = node.get(key)
            if isinstance(count, int | float) and abs(count) > _MOST_REPETITIONS:
                raise _unusable(param, f"it asks for {count} repetitions, and the limit is {_MOST_REPETITIONS}")
        pattern = node.get("pattern")
        if isinstance(pattern, str) and (choices := written_out(pattern)) > _MOST_CHOICES:
            raise _unusable(
                param, f"a pattern has {choices} characters and choices, written out, and the limit is {_MOST_CHOICES}"
            )
    for child in node.values() if isinstance(node, dict) else _list(node):
        _check_repetitions(child, param)


def written_out(pattern: str) -> int:
    """Characters, classes and choices of a regular expression when its counted repetitions are written out.

    What may be left out, or may be this or that, counts as a choice (`?`, `*`, `+`, `|`). A count of one class, as in
    `[a-z]{0,63}`, is not written out: it has no choices inside.
    """
    groups, last, last_is_plain = [0], 0, True  # items of each open group; items of what a repetition would repeat
    for token in _PATTERN_TOKEN.finditer(pattern):
        if token["count"] is not None:
            if not last_is_plain:
                more = last * (max(int(number[:9]) for number in re.findall(r"\d+", token["count"]) or ["1"]) - 1)
                groups[-1] += more
                last += more
        elif token[0] == "(":
            groups.append(0)
        elif token[0] == ")" and len(groups) > 1:
            last, last_is_plain = groups.pop(), False
            groups[-1] += last
        elif token[0] in "*+?|":
            groups[-1] += 1
        else:
            groups[-1] += 1
            last, last_is_plain = 1, True
    return sum(groups)


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
    return Refused(400, f"cannot use the {param}: {reason}", code="invalid_json_schema", param=param)
