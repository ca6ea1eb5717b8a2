"""The verdicts that lm-eval's own metrics cannot give: `process_results` in a task's YAML."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from samq.evaluation.json_compliance import judge_answer
from samq.evaluation.json_prompts import JsonPrompt, load_prompts
from samq.evaluation.sandbox.run import run_tests


def humaneval(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """`pass@1` of one completion: 1 if it passes the problem's tests, run in a child process."""
    tests = f"{document['test']}\ncheck({document['entry_point']})"
    return {"pass@1": float(run_tests(document["prompt"] + answers[0], tests).passed)}


def humaneval_instruct(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """`pass@1` of a completion inside a code fence, of which what follows the fence is no part."""
    return humaneval(document, [answers[0].partition("```")[0]])


def json_answer(document: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """What `samq.evaluation.json_compliance` says of an answer."""
    verdict = judge_answer(_json_prompts()[document["id"]], answers[0])
    columns = {"valid": "valid", "valid_or_fenced": "valid_fenced", "parsed": "parsed"}
    return {metric: float(verdict[column]) for metric, column in columns.items()}


@lru_cache
def _json_prompts() -> dict[str, JsonPrompt]:
    return {prompt.id: prompt for prompt in load_prompts()}
