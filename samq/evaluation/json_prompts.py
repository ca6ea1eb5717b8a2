"""The tasks of JSON compliance, and how they are put to a model.

A task's answer is checked against its JSON schema. The model is shown an outline instead, in the shape that the answer has:
`{"name": string, "age": integer 0 to 130}`. Small models copy a schema, and large ones understand both. Shown the schema,
SmolLM2-135M gave no valid answer of 40; shown the outline, 14 to 17. Two worked examples come first. All prompts share them, so
they cost next to nothing.
"""

import json
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from samq.llamacpp.chat import tokenize_chat
from samq.llamacpp.runtime import Model


class JsonPrompt(BaseModel):
    """A task whose answer must fit a schema; `example` is one that does."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str
    prompt: str
    json_schema: dict[str, Any] = Field(alias="schema")
    example: Any


SHOWN = (
    JsonPrompt(
        id="fruit",
        prompt="Describe the fruit: 'A ripe banana of 120 grams.'",
        schema={
            "type": "object",
            "properties": {
                "fruit": {"type": "string"},
                "grams": {"type": "integer", "minimum": 1},
                "ripe": {"type": "boolean"},
            },
            "required": ["fruit", "grams", "ripe"],
            "additionalProperties": False,
        },
        example={"fruit": "banana", "grams": 120, "ripe": True},
    ),
    JsonPrompt(
        id="even",
        prompt="Give two even numbers.",
        schema={"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
        example=[2, 4],
    ),
)


def load_prompts() -> list[JsonPrompt]:
    """The prompts that come with SAMQ, `json_prompts.jsonl` beside this module."""
    lines = files("samq.evaluation").joinpath("json_prompts.jsonl").read_text().splitlines()
    return [JsonPrompt.model_validate_json(line) for line in lines]


def chat_tokens(model: Model, prompt: JsonPrompt) -> NDArray[np.int32]:
    """Token ids of the examples and the task, as turns of the model's chat template, up to where the answer begins.

    A model without a template gets the turns as plain text.
    """
    turns: list[Any] = []
    for shown in SHOWN:
        turns.append({"role": "user", "content": question(shown)})
        turns.append({"role": "assistant", "content": json.dumps(shown.example)})
    turns.append({"role": "user", "content": question(prompt)})
    if model.chat_template is None:
        lines = [f"{'Answer: ' if turn['role'] == 'assistant' else ''}{turn['content']}\n" for turn in turns]
        return model.tokenize_prompt("\n".join([*lines, "Answer:"]))
    return tokenize_chat(model, turns)


def question(prompt: JsonPrompt) -> str:
    """What the user says."""
    form = outline(prompt.json_schema)
    return f"Answer with JSON of the given form, and with nothing else.\n{prompt.prompt}\nForm: {form}"


def outline(schema: dict[str, Any]) -> str:
    """A schema in the shape of what it describes, with all that it demands.

    Raises ValueError for a keyword that it cannot show: a demand must not be hidden from the model.
    """
    rest = dict(schema)
    if "const" in rest:
        text = json.dumps(rest.pop("const"))
    elif "enum" in rest:
        text = " | ".join(json.dumps(value) for value in rest.pop("enum"))
    elif (kind := rest.pop("type")) == "object":
        required = rest.pop("required")
        properties = rest.pop("properties").items()
        fields = (f'"{name}"{"" if name in required else "?"}: {outline(value)}' for name, value in properties)
        text = "{" + ", ".join(fields) + "}"
        if rest.pop("additionalProperties") is not False:
            raise ValueError("an outline allows no additional properties")
    elif kind == "array":
        text = f"[{outline(rest.pop('items'))}, ...]" + _range(rest, "minItems", "maxItems", " items")
        text += " all different" if rest.pop("uniqueItems", False) else ""
    else:
        text = " | ".join([kind] if isinstance(kind, str) else kind)
        text += _range(rest, "minimum", "maximum", "") + _range(rest, "minLength", "maxLength", " characters")
        for keyword in ("pattern", "format"):
            text += f" {keyword} {rest.pop(keyword)}" if keyword in rest else ""
    if rest:
        raise ValueError(f"an outline cannot show {sorted(rest)}")
    return text


def _range(schema: dict[str, Any], lowest: str, highest: str, unit: str) -> str:
    """Take a lower and an upper bound out of `schema`, as text: ` 2 to 4 items`."""
    low, high = schema.pop(lowest, None), schema.pop(highest, None)
    if low is None and high is None:
        return ""
    if low == high or high is None:
        return f" {low}{unit}" + ("" if low == high else " or more")
    return (f" up to {high}" if low is None else f" {low} to {high}") + unit
