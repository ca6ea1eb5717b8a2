"""Converts `response_format` to a llama.cpp grammar (GBNF), which every answer follows.

This module limits schemas first, for three reasons. The converter of llama-cpp-python writes repetitions out, so a schema
of a few bytes could take all memory. Its time grows with the cube of an object's optional properties, and it blocks the
interpreter meanwhile. And llama.cpp follows all possible matches of a pattern at once, and cannot be interrupted.
"""

import json
import re
from typing import Any

from llama_cpp.llama_grammar import JSON_GBNF, SchemaConverter

from samq.serving.refusal import Refused

_MOST_REPETITIONS = 1000  # llama.cpp itself refuses more than 2000
_MOST_PATTERN_ITEMS = 200  # written out; ^(a?){1000}$ takes llama.cpp 3 s a token, ^((a?){500}){500}$ no bearable time
_MOST_PROPERTIES = 1000  # of all objects together; an object counts once for each use
_MOST_OPTIONAL = 200  # of these; they take 0.1 s, and 900 would take 4 s
_MOST_SCHEMA_BYTES = 32 * 1024
_MOST_GRAMMAR_BYTES = 256 * 1024
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
_REGEX_TOKEN = re.compile(r"\\.|\[(?:\\.|[^\]])*\]|\{(?P<count>[^}]*)\}|.", re.DOTALL)
_PARAM = "response_format"


def json_grammar() -> str:
    """The grammar of any JSON object."""
    return JSON_GBNF


def schema_grammar(schema: dict[str, Any]) -> str:
    """The grammar of a JSON schema. It does not enforce what a grammar cannot express, such as `minimum`.

    Raises Refused (400) if the schema cannot be converted, or if its grammar is too large.
    """
    try:
        text = json.dumps(schema)
        if len(text) > _MOST_SCHEMA_BYTES:
            raise _refused(f"it has {len(text)} bytes, and the limit is {_MOST_SCHEMA_BYTES}")
        _check_repetitions(schema)
        converter = _Converter()
        converter.visit(converter.resolve_refs(json.loads(text), "stdin"), "")  # type: ignore[no-untyped-call]
        grammar: str = converter.format_grammar()  # type: ignore[no-untyped-call]
        grammar.encode()  # raises an error if a pattern has half a character (a lone surrogate)
    except Refused:
        raise
    except Exception as error:  # the converter checks with assert, and uses keys that may be missing
        reason = str(error).partition("\n")[0][:200] or "it is nested too deep, or refers to itself"
        raise _refused(f"llama.cpp cannot convert it to a grammar ({type(error).__name__}: {reason})") from error
    if len(grammar) > _MOST_GRAMMAR_BYTES:
        raise _refused(f"its grammar has {len(grammar)} bytes, and the limit is {_MOST_GRAMMAR_BYTES}")
    return grammar


class _Converter(SchemaConverter):
    """A converter that refuses too many properties, after it has merged those of `allOf`."""

    def __init__(self) -> None:
        super().__init__(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)  # type: ignore[no-untyped-call]
        self._properties = self._optional = 0

    def _build_object_rule(
        self, properties: list[tuple[str, Any]], required: set[str], name: str, additional_properties: Any
    ) -> str:
        self._properties += len(properties)
        self._optional += sum(key not in required for key, _ in properties)
        for count, most, kind in (
            (self._properties, _MOST_PROPERTIES, "properties"),
            (self._optional, _MOST_OPTIONAL, "properties that are not required"),
        ):
            if count > most:
                raise _refused(f"it has {count} {kind}, and the limit is {most}")
        rule: str = super()._build_object_rule(properties, required, name, additional_properties)
        return rule


def _check_repetitions(node: Any) -> None:
    """Raises Refused if any part of a schema has too many repetitions, or a pattern that is too long."""
    if isinstance(node, dict):
        for key in _COUNTS:
            count = node.get(key)
            if isinstance(count, int) and abs(count) > _MOST_REPETITIONS:
                raise _refused(f"it asks for {count} repetitions, and the limit is {_MOST_REPETITIONS}")
        if isinstance(pattern := node.get("pattern"), str) and (items := written_out(pattern)) > _MOST_PATTERN_ITEMS:
            raise _refused(f"a pattern has {items} characters, written out, and the limit is {_MOST_PATTERN_ITEMS}")
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _check_repetitions(child)


def written_out(pattern: str) -> int:
    """Characters and classes of a regular expression when its counted repetitions are written out, 9 digits at most."""
    groups, last = [0], 0  # items of each open group; items of what a repetition would repeat
    for token in _REGEX_TOKEN.finditer(pattern):
        if token["count"] is not None:
            more = last * (max(int(number[:9]) for number in re.findall(r"\d+", token["count"]) or ["1"]) - 1)
            groups[-1] += more
            last += more
        elif token[0] == "(":
            groups.append(0)
        elif token[0] == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif token[0] not in "*+?|":
            groups[-1] += 1
            last = 1
    return sum(groups)


def _refused(reason: str) -> Refused:
    return Refused(400, f"cannot use the JSON schema: {reason}", code="invalid_json_schema", param=_PARAM)
