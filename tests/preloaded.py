"""Runs programs as forks of this process, in which the libraries that take a program longest to import are imported.

Prefect is not among them: it reads its settings when it is imported. A line on standard input is a request, a line on
standard output the exit code of what it asked for.
"""

import importlib
import json
import os
import runpy
import sys

LIBRARIES = ("samq.evaluation.lm_eval.harness", "samq.sensitivity.measure", "samq.tracking.sweep_runs")


def next_request() -> dict | None:
    """Fork at each request. The child returns it; the parent waits for the child, and returns None in the end."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def carry_out(request: dict) -> None:
    """Become the program of a request: its arguments, environment, folder and output."""
    for descriptor, path, mode in ((0, os.devnull, "r"), (1, request["stdout"], "w"), (2, request["stderr"], "w")):
        with open(path, mode) as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv[1:] = request["arguments"]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    assert "prefect" not in sys.modules
    if (request := next_request()) is not None:
        carry_out(request)
