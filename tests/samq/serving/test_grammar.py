import pytest

from samq.serving.grammar import schema_grammar, written_out
from samq.serving.refusal import Refused


def test_a_schema_becomes_a_grammar_with_its_properties():
    grammar = schema_grammar({"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]})
    assert "root ::=" in grammar and '\\"age\\"' in grammar


def nested(depth):
    schema = {"type": "null"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def members(count):
    return {"type": "object", "properties": {f"member{number}": {"type": "null"} for number in range(count)}}


def test_many_properties_are_a_grammar_still():
    assert "member199-kv" in schema_grammar(members(200))
    required = {**members(700), "required": list(members(700)["properties"])}
    assert "member699-kv" in schema_grammar(required)


@pytest.mark.parametrize(
    "schema, reason",
    [
        ({"type": "array", "items": {"type": "null"}, "minItems": 10**9}, "asks for 1000000000 repetitions"),
        ({"type": "string", "maxLength": 10**7}, "asks for 10000000 repetitions"),
        ({"type": "string", "pattern": "^a{1,99999}$"}, "has 100001 characters, written out"),
        ({"anyOf": [{"type": "string", "pattern": "^((a?){500}){500}$"}]}, "has 250002 characters, written out"),
        ({"type": "string", "pattern": "a"}, "cannot convert it to a grammar"),  # not anchored
        ({"type": "string", "pattern": "^\ud800$"}, "cannot convert it to a grammar"),
        ({"$ref": "https://example.com/schema.json"}, "cannot convert it to a grammar"),
        ({"$ref": "#/nowhere"}, "cannot convert it to a grammar"),
        ({"type": "colour"}, "cannot convert it to a grammar"),
        (members(201), "has 201 properties that are not required, and the limit is 200"),
        ({"type": "array", "items": [members(150), members(51)]}, "has 201 properties that are not required"),
        (
            {"$defs": {"d": members(50)}, "allOf": [{"$ref": "#/$defs/d"}] * 100},
            "has 5000 properties, and the limit is 1000",
        ),
        ({"type": "array", "items": 3}, "cannot convert it to a grammar"),
        ({"enum": ["x" * 40_000]}, "has 40014 bytes"),
        (nested(2500), "RecursionError"),
        ({"type": "string", "minLength": "many"}, "cannot convert it to a grammar"),
        ({"type": "string", "minLength": -(10**9), "maxLength": 900}, "repetitions"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_with_the_reason(schema, reason):
    with pytest.raises(Refused, match=reason) as refused:
        schema_grammar(schema)
    assert refused.value.status == 400
    assert refused.value.body["error"]["param"] == "response_format"


@pytest.mark.parametrize(
    "pattern, items",
    [
        ("^abc$", 5),
        (r"^\d{4}-\d{2}-[0-9]{2}$", 12),
        ("(ab){3}", 6),
        ("((ab){3}c){2}", 14),
        ("(a?|b*)+", 2),
        ("a{2,5}", 5),
        ("a{2,}", 2),
        (r"[\]a]{2}\)", 3),
        ("a{99999999999999999999}", 999_999_999),
        ("))a{", 4),
        ("", 0),
    ],
)
def test_what_a_pattern_comes_to_when_written_out(pattern, items):
    assert written_out(pattern) == items
