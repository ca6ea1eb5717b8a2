"""What a JSON schema costs llama.cpp, counted before it sees it."""

from typing import Literal

import pytest
from pydantic import BaseModel

from samq.llamacpp.grammar_cost import Cost, UnusableGrammar
from samq.llamacpp.schema_cost import schema_cost

TEXT = {"type": "string"}


def chain(length, step, leaf=TEXT):
    """Definitions, each made of `$ref`s to the next."""
    definitions = {f"d{number}": step({"$ref": f"#/$defs/d{number + 1}"}) for number in range(length)}
    return {"$defs": {**definitions, f"d{length}": leaf}, "$ref": "#/$defs/d0"}


def an_object(*names, required=(), **properties):
    return {"type": "object", "properties": dict.fromkeys(names, TEXT) | properties, "required": list(required)}


class Tree(BaseModel):
    name: str
    children: list["Tree"] = []


class Sum(BaseModel):
    kind: Literal["sum"]
    terms: list["Sum | Product | float"]


class Product(BaseModel):
    kind: Literal["product"]
    factors: list[Sum | float]


@pytest.mark.parametrize(
    "schema, matches",
    [
        (True, 1),
        (TEXT, 1),
        ({"anyOf": [TEXT] * 7}, 7),
        ({"type": ["string", "null"]}, 1),
        ({"anyOf": [TEXT, {"type": "null"}, {"type": "integer"}]}, 1),
        ({"enum": [f"value {number}" for number in range(500)]}, 500),
        (an_object(*map(str, range(200))), 200),
        (an_object(*map(str, range(200)), required=map(str, range(200))), 1),
        ({"type": "array", "maxItems": 100, "items": an_object(*map(str, range(20)))}, 20),
        ({"anyOf": [an_object("a", required="a"), an_object("b", required="b")]}, 1),
        ({"anyOf": [an_object("a", required="a"), an_object("a", "b", required="a")]}, 2),
        ({"anyOf": [an_object(kind={"const": name}, required=["kind"]) for name in "abc"]}, 1),
        (Tree.model_json_schema(), 1),
        (Sum.model_json_schema(), 1),
        (an_object(child={"$ref": "#"}), 1),
        (chain(3, lambda ref: {"anyOf": [ref] * 8}), 8**3),
        (chain(3, lambda ref: {"allOf": [ref] * 8}), 8**3),
        (chain(3, lambda ref: {"anyOf": [{"type": "array", "items": ref}] * 8}), 8**3),
        (chain(12, lambda ref: {"anyOf": [ref] * 8}), 10**9),
        (chain(12, lambda ref: {"type": "array", "minItems": 8, "items": ref}), 1),
        (chain(12, lambda ref: an_object(**dict.fromkeys("abcdefgh", ref))), 8),
        (chain(500, lambda ref: an_object(next=ref)), 1),
        (
            {"$defs": {"n": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/n"}}] * 2}}, "$ref": "#/$defs/n"},
            4096,
        ),
    ],
)
def test_the_matches_at_once_of_a_schema(schema, matches):
    assert schema_cost(schema).matches == matches


def test_nested_lists_of_types_are_written_out():
    schema = TEXT
    for _ in range(30):
        schema = {"type": ["array", "array"], "items": schema}
    assert schema_cost(schema) == Cost(matches=10**9, elements=10**9)


@pytest.mark.parametrize(
    "schema, elements",
    [
        ({"type": "array", "minItems": 1000, "items": {"type": "null"}}, 3001),
        ({"anyOf": [{"type": "array", "minItems": 1000, "items": {"type": "null"}}] * 300}, 900_300),
        ({"type": "string", "maxLength": 1000}, 3001),
        ({"type": "string", "pattern": "^[a-z]{1000}$"}, 5003),
    ],
)
def test_the_elements_of_a_schema_written_out(schema, elements):
    assert schema_cost(schema).elements == pytest.approx(elements, abs=5)


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"a": {"$ref": "#/$defs/a"}}, "allOf": [{"$ref": "#/$defs/a"}]},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"$ref": "#"},
    ],
)
def test_a_reference_that_leads_to_itself_is_found(schema):
    with pytest.raises(UnusableGrammar, match="leads back to itself"):
        schema_cost(schema)
