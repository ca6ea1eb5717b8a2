"""`response_format` -> a grammar of llama.cpp (GBNF), which no answer can leave.

The converter of llama-cpp-python writes repetitions out, so a schema of a few bytes could take all memory; its time grows
with the cube of an object's optional properties, and the interpreter does nothing else meanwhile; and llama.cpp follows
all ways at once in which a pattern can match, and cannot be interrupted: what a schema may ask for is bounded here first.
"""

import json
import re
from typing import Any

from llama_cpp.llama_grammar import JSON_GBNF, SchemaConverter

from samq.serving.refusal import Refused

_MOST_REPETITIONS = 1000  # llama.cpp itself refuses more than 2000
_MOST_PATTERN_ITEMS = 200  # written out; ^(a?){1000}$ takes llama.cpp 3 s a token, ^((a?){500}){500}$ no bearable time
_MOST_PROPERTIES = 1000  # of all objects together, in each place where one is used
_MOST_OPTIONAL = 200  # of these; they take 0.1 s, and 900 would take 4 s
_MOST_SCHEMA_BYTES = 32 * 1024
_MOST_GRAMMAR_BYTES = 256 * 1024
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
_REGEX_TOKEN = re.compile(r"\\.|\[(?:\\.|[^\]])*\]|\{(?P<count>[^}]*)\}|.", re.DOTALL)
_PARAM = "response_format"


def json_grammar() -> str:
    """Any JSON object."""
    return JSON_GBNF


def schema_grammar(schema: dict[str, Any]) -> str:
    """What a JSON schema allows, as far as a grammar can say it: not, for example, `minimum` or `uniqueItems`.

    Raises Refused (400) for a schema that cannot be turned into a grammar of reasonable size.
    """
    try:
        text = json.dumps(schema)
        if len(text) > _MOST_SCHEMA_BYTES:
            raise _refused(f"it has {len(text)} bytes, and {_MOST_SCHEMA_BYTES} are allowed")
        _check_repetitions(schema)
        converter = _Converter()
        converter.visit(converter.resolve_refs(json.loads(text), "stdin"), "")
        grammar: str = converter.format_grammar()
        grammar.encode()  # a pattern can hold half a character
    except Refused:
        raise
    except Exception as error:  # the converter checks with assert, and indexes what may not be there
        reason = str(error).partition("\n")[0][:200] or "it is nested too deep, or refers to itself"
        raise _refused(f"llama.cpp makes no grammar of it ({type(error).__name__}: {reason})") from error
    if len(grammar) > _MOST_GRAMMAR_BYTES:
        raise _refused(f"its grammar has {len(grammar)} bytes, and {_MOST_GRAMMAR_BYTES} are allowed")
    return grammar


class _Converter(SchemaConverter):
    """Refuses more properties than it can bear, where it has put together those of `allOf`."""

    def __init__(self) -> None:
        super().__init__(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
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
                raise _refused(f"it has {count} {kind}, and {most} are allowed")
        rule: str = super()._build_object_rule(properties, required, name, additional_properties)
        return rule


def _check_repetitions(node: Any) -> None:
    """Raises Refused for more than a grammar can bear, wherever it stands in a schema."""
    if isinstance(node, dict):
        for key in _COUNTS:
            count = node.get(key)
            if isinstance(count, int) and abs(count) > _MOST_REPETITIONS:
                raise _refused(f"it asks for {count} repetitions, and {_MOST_REPETITIONS} are allowed")
        if isinstance(pattern := node.get("pattern"), str) and (items := written_out(pattern)) > _MOST_PATTERN_ITEMS:
            raise _refused(f"a pattern has {items} characters, written out, and {_MOST_PATTERN_ITEMS} are allowed")
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
    return Refused(400, f"the JSON schema cannot be used: {reason}", code="invalid_json_schema", param=_PARAM)
