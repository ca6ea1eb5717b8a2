"""`python -m samq.evaluation REQUEST.json`: carry out a BaselineRequest, an EvaluationRequest or a BenchmarkRequest.

Prints `progress: WHAT DONE/TOTAL` lines. Exits with 2, and one sentence as the last line, on an error that a person can
act on.
"""

import json
import logging
import sys
from pathlib import Path

from samq.errors import SamqError
from samq.evaluation.measure import compute_baseline, evaluate
from samq.evaluation.settings import BaselineRequest, BenchmarkRequest, EvaluationRequest


def _report(what: str, done: int, total: int) -> None:
    print(f"progress: {what} {done}/{total}", flush=True)


def main(arguments: list[str]) -> int:
    """Carry out the request in the file named; returns the exit code."""
    if len(arguments) != 1:
        print("usage: python -m samq.evaluation REQUEST.json", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    path = Path(arguments[0])
    try:
        match _schema(path):
            case BaselineRequest.SCHEMA:
                compute_baseline(BaselineRequest.load(path), _report)
            case BenchmarkRequest.SCHEMA:
                from samq.evaluation.lm_eval.benchmarks import (
                    benchmark,  # takes a second, which the others need not wait
                )

                benchmark(BenchmarkRequest.load(path), _report)
            case _:
                evaluate(EvaluationRequest.load(path), _report)
    except SamqError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _schema(path: Path) -> str | None:
    """Which record a file says that it holds; None if it cannot be told, which loading it will explain."""
    try:
        return str(json.loads(path.read_text())["schema"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
