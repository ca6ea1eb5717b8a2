"""`response_format` -> a grammar of llama.cpp (GBNF), which no answer can leave.

The converter of llama-cpp-python writes repetitions out, and follows what a schema says without a limit, so a schema
of a few bytes could take all memory: what it may ask for is bounded here first.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from llama_cpp.llama_grammar import JSON_GBNF, json_schema_to_gbnf

from samq.serving.refusal import Refused

_MOST_REPETITIONS = 1000  # llama.cpp itself refuses more than 2000
_MOST_SCHEMA_BYTES = 32 * 1024
_MOST_GRAMMAR_BYTES = 256 * 1024
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
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
        for count in _repetitions(schema):
            if count > _MOST_REPETITIONS:
                raise _refused(f"it asks for {count} repetitions, and {_MOST_REPETITIONS} are allowed")
        grammar = json_schema_to_gbnf(text)
        grammar.encode()  # a pattern can hold half a character
    except Refused:
        raise
    except Exception as error:  # the converter checks with assert, and indexes what may not be there
        reason = str(error).partition("\n")[0][:200] or "it is nested too deep, or refers to itself"
        raise _refused(f"llama.cpp makes no grammar of it ({type(error).__name__}: {reason})") from error
    if len(grammar) > _MOST_GRAMMAR_BYTES:
        raise _refused(f"its grammar has {len(grammar)} bytes, and {_MOST_GRAMMAR_BYTES} are allowed")
    return grammar


def _repetitions(node: Any) -> Iterator[int]:
    """Every count that the converter would write out."""
    if isinstance(node, dict):
        counts = (node[key] for key in _COUNTS if isinstance(node.get(key), int))
        yield from map(abs, counts)  # the converter subtracts the least from the most
        if isinstance(pattern := node.get("pattern"), str):
            yield from (int(count[:9]) for count in re.findall(r"\d+", " ".join(re.findall(r"\{[^}]*", pattern))))
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _repetitions(child)


def _refused(reason: str) -> Refused:
    return Refused(400, f"the JSON schema cannot be used: {reason}", code="invalid_json_schema", param=_PARAM)
