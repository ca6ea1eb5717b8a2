"""JSON compliance: how often a model that is asked for JSON of a schema answers with exactly that.

Decoding is greedy and unconstrained: no grammar helps, because it is the model that is measured. A valid answer is one JSON
value that the schema accepts (draft 2020-12, formats checked), apart from white space around it. JSON is that of RFC 8259:
no NaN, no comments, no code fence, no words before or after. What would be valid without the code fence around it is counted
apart.
"""

import json
import math
import re
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NoReturn

import pandas as pd
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from samq.evaluation.json_prompts import JsonPrompt, chat_tokens
from samq.evaluation.settings import EvaluationSettings
from samq.llamacpp.fit import Room
from samq.llamacpp.generation import Decoding, generate, room_for
from samq.llamacpp.runtime import Model
from samq.progress import Progress, silent
from samq.records import Metric

_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?```", re.DOTALL)
_UNFINISHED = re.compile(r"[\w.+-]*")
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*"|["{}\[\]]', re.DOTALL)  # whole strings first; a lone quote opens one


def measure_json(
    model: Model, prompts: Sequence[JsonPrompt], settings: EvaluationSettings, progress: Progress = silent
) -> tuple[dict[str, Metric], pd.DataFrame]:
    """Ask every prompt, and judge_answer the answers.

    Returns the metrics (`json/...`) and a row for each prompt: id, output, parsed, valid, valid_fenced (valid, or valid
    inside one code fence), error.
    """
    answers = generate(
        model,
        [chat_tokens(model, prompt) for prompt in prompts],
        Decoding(settings.json_tokens, is_settled),
        kv_type=settings.kv_type,
        threads=settings.threads,
        progress=progress,
    )
    items = pd.DataFrame([judge_answer(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)])
    return summarize_answers(items), items


def json_room(model: Model, prompts: Sequence[JsonPrompt], settings: EvaluationSettings) -> Room:
    """The context in which the prompts are answered; the model needs no weights."""
    return room_for([chat_tokens(model, prompt) for prompt in prompts], settings.json_tokens, settings.kv_type)


def is_settled(answer: str) -> bool:
    """Whether nothing that could follow would make an answer valid, so that generation can stop.

    It is settled in three cases:

    - It starts with something other than an object, an array or a code fence. Every schema here asks for an object or an array.
    - It has a syntax error that no more text mends.
    - Something else follows the end of the value or the fence.

    An answer that has just ended is not settled: the model must also end there.
    """
    text = answer.lstrip()
    if text.startswith(("{", "[")):
        end = _value_end(text)
        if end is None:
            return _is_broken(text)
    elif text.startswith("```"):
        fence = text.find("```", 3)
        end = None if fence < 0 else fence + 3
    else:
        return not "```".startswith(text[:3])
    return end is not None and bool(text[end:].strip())


def judge_answer(prompt: JsonPrompt, answer: str) -> dict[str, Any]:
    """The row of one answer: see `measure_json`."""
    parsed, error = _verdict(prompt.json_schema, answer)
    fenced = _FENCED.fullmatch(answer.strip())
    return {
        "id": prompt.id,
        "output": answer,
        "parsed": parsed,
        "valid": error is None,
        "valid_fenced": error is None or (fenced is not None and _verdict(prompt.json_schema, fenced[1])[1] is None),
        "error": error,
    }


def summarize_answers(items: pd.DataFrame) -> dict[str, Metric]:
    """Rates in per cent with their standard errors, and the Wilson interval (95 %) of the headline, valid_percent."""
    n = len(items)
    low, high = wilson_interval(int(items["valid"].sum()), n)
    metrics = {}
    for name, column in (("valid", "valid"), ("parse", "parsed"), ("valid_or_fenced", "valid_fenced")):
        rate = float(items[column].mean())
        metrics[f"json/{name}_percent"] = Metric(value=100 * rate, stderr=100 * math.sqrt(rate * (1 - rate) / n), n=n)
    metrics["json/valid_low_percent"] = Metric(value=100 * low, n=n)
    metrics["json/valid_high_percent"] = Metric(value=100 * high, n=n)
    return metrics


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927), which holds up for few trials and rates near 0 or 1."""
    z = NormalDist().inv_cdf(0.975)
    rate = successes / n
    centre = rate + z * z / (2 * n)
    margin = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def _verdict(schema: dict[str, Any], text: str) -> tuple[bool, str | None]:
    """Whether `text` is JSON, and what is wrong with it (None: nothing)."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return False, f"not JSON: {error}"
    validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
    mismatch = best_match(validator.iter_errors(value))
    return True, None if mismatch is None else f"{mismatch.json_path}: {mismatch.message}"


def _refuse_constant(name: str) -> NoReturn:
    """Python's parser takes NaN and Infinity; JSON has neither."""
    raise ValueError(f"{name} is no JSON number")


def _is_broken(text: str) -> bool:
    """Whether the start of an object or array has a syntax error in what is complete, so that going on is no use.

    Two things are not complete. One is a run of letters, digits and signs at the end, which may yet become a number, `true`,
    `false` or `null`. The other is a string or an escape that is not closed.
    """
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        rest = text[error.pos :].strip()
        may_be_mended = "string starting" in error.msg or "escape" in error.msg or _UNFINISHED.fullmatch(rest)
        return not may_be_mended
    except RecursionError:
        return True
    return False


def _value_end(text: str) -> int | None:
    """Where the object or array that `text` starts with ends: after its last bracket; None if it goes on."""
    depth = 0
    for match in _STRUCTURE.finditer(text):
        if match[0] in "{[":
            depth += 1
        elif match[0] in "}]":
            depth -= 1
            if depth == 0:
                return match.end()
        elif match[0] == '"':
            return None
    return None
