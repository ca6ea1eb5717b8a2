import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from samq.evaluation.json_compliance import is_settled, judge_answer, measure_json, summarize_answers, wilson_interval
from samq.evaluation.json_prompts import JsonPrompt, chat_tokens, load_prompts, outline
from samq.evaluation.settings import EvaluationSettings
from samq.llamacpp.runtime import Model

PERSON = JsonPrompt(
    id="person",
    prompt="Who?",
    schema={
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name"],
        "additionalProperties": False,
    },
    example={"name": "Ada"},
)


def test_there_are_at_least_30_prompts_and_each_schema_takes_its_example():
    prompts = load_prompts()
    assert len(prompts) >= 30 and len({prompt.id for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        Draft202012Validator.check_schema(prompt.json_schema)
        row = judge_answer(prompt, json.dumps(prompt.example))
        assert row["valid"], (prompt.id, row["error"])
        assert outline(prompt.json_schema)


@pytest.mark.parametrize(
    ("answer", "parsed", "valid", "fenced"),
    [
        ('{"name": "Ada", "age": 36}', True, True, True),
        ('\n {"name": "Ada"} \n', True, True, True),
        ('{"name": "Ada", "age": -1}', True, False, False),
        ('{"name": "Ada", "age": "36"}', True, False, False),
        ('{"name": "Ada", "born": 1815}', True, False, False),
        ('{"age": 36}', True, False, False),
        ('[{"name": "Ada"}]', True, False, False),
        ('```json\n{"name": "Ada"}\n```', False, False, True),
        ('```\n{"age": 36}\n```', False, False, False),
        ('Here it is: {"name": "Ada"}', False, False, False),
        ('{"name": "Ada"} I hope this helps.', False, False, False),
        ("{'name': 'Ada'}", False, False, False),
        ('{"name": "Ada",}', False, False, False),
        ('{"name": "Ada", "age": NaN}', False, False, False),
        ('{"name": "Ada"', False, False, False),
        ("[" * 100_000, False, False, False),
        ("", False, False, False),
    ],
)
def test_an_answer_is_valid_when_all_of_it_is_json_of_the_schema(answer, parsed, valid, fenced):
    row = judge_answer(PERSON, answer)
    assert (row["parsed"], row["valid"], row["valid_fenced"]) == (parsed, valid, fenced)
    assert (row["error"] is None) == valid


@pytest.mark.parametrize(
    ("answer", "settled"),
    [
        ("", False),
        (" \n", False),
        ("`", False),
        ("``", False),
        ("```json\n{", False),
        ("```json\n{}\n```", False),
        ("```json\n{}\n``` That", True),
        ("Sure", True),
        ('{"a": "}', False),
        ('{"a": "}"', False),
        ('{"a": "\\"}"}', False),
        ('{"a": 1}', False),
        ('{"a": 1}\n', False),
        ('{"a": 1} {', True),
        ("[1, [2]]", False),
        ("[1, [2]],", True),
        ('{"a": 0.5', False),
        ('{"a": 0.5 ', False),
        ('{"a": 0.5 t', False),
        ('{"a": 0.5 to 1', True),
        ('{"a": 1.', False),
        ('{"a": -', False),
        ('{"a": 1e+', False),
        ('{"a": tru', False),
        ('{"a": true', False),
        ('{"a": string,', True),
        ("[string, ", True),
        ('{"a"', False),
        ('{"a" ', False),
        ('{"a": 1, ', False),
        ('{"a": 1, b:', True),
        ('{"a": "\\u00', False),
        ('{"a": "\\', False),
        ("[[1, 2], ", False),
        ("[" * 100_000, True),
    ],
)
def test_generation_stops_when_nothing_could_make_the_answer_valid(answer, settled):
    assert is_settled(answer) is settled


def test_stopping_early_never_turns_a_valid_answer_away():
    for prompt in load_prompts():
        indented = json.dumps(prompt.example, indent=1)
        for text in (json.dumps(prompt.example), indented, f"```json\n{indented}\n```"):
            assert not any(is_settled(text[:end]) for end in range(len(text) + 1)), prompt.id


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ).filter(lambda value: isinstance(value, list | dict)),
    st.booleans(),
    st.sampled_from([None, 2]),
)
def test_no_start_of_json_is_ever_settled(value, ascii_only, indent):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert not any(is_settled(text[:end]) for end in range(len(text) + 1))


@settings(deadline=None)
@given(st.text(alphabet='{}[]":, 0123456789.eE+-truefalsn\\u`\n', max_size=30), st.text(max_size=10))
def test_what_is_settled_is_neither_valid_nor_becomes_so(start, more):
    start = "{" + start
    if is_settled(start):
        rows = [judge_answer(PERSON, text) for text in (start, start + more, start + "}", start + '"}')]
        assert not any(row["parsed"] or row["valid_fenced"] for row in rows)


def test_the_wilson_interval_is_the_textbooks():
    # Newcombe 1998, table I: 81 of 263 and 0 of 20 by Wilson's score method without continuity correction
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson_interval(20, 20)[1] == 1


def test_rates_are_per_cent_of_all_prompts():
    items = pd.DataFrame({"valid": [1, 0, 0, 1], "parsed": [1, 1, 0, 1], "valid_fenced": [1, 1, 0, 1]}).astype(bool)
    metrics = summarize_answers(items)
    assert metrics["json/valid_percent"].value == 50 and metrics["json/valid_percent"].n == 4
    assert metrics["json/parse_percent"].value == metrics["json/valid_or_fenced_percent"].value == 75
    assert metrics["json/valid_low_percent"].value < 50 < metrics["json/valid_high_percent"].value


def test_an_outline_hides_no_demand_of_the_schema():
    assert outline(PERSON.json_schema) == '{"name": string, "age"?: integer 0 or more}'
    with pytest.raises(ValueError, match="cannot show"):
        outline({"type": "integer", "multipleOf": 7})


@pytest.mark.e2e
def test_a_real_model_answers_the_same_every_time(smollm2_q4_k_m):
    settings = EvaluationSettings(json_tokens=48)
    prompts = load_prompts()[:4]
    with Model(smollm2_q4_k_m) as model:
        text = b"".join(model.piece(token) for token in chat_tokens(model, prompts[0]))
        assert prompts[0].prompt.encode() in text
        metrics, items = measure_json(model, prompts, settings)
        again = measure_json(model, prompts, settings)[1]
    assert items.equals(again)
    assert items["id"].tolist() == [prompt.id for prompt in prompts]
    judged = [judge_answer(prompt, output)["valid"] for prompt, output in zip(prompts, items["output"], strict=True)]
    assert judged == items["valid"].tolist()
    assert metrics["json/valid_percent"].value == 100 * items["valid"].mean()
