"""Runs Python modules as programs, each in a process of its own that is forked from this one.

What takes a program longest by far, to import the libraries, is done here once. Prefect is not among them: it reads its
settings when it is imported. A line on standard input is a request; the answer on standard output is the exit code.
"""

import importlib
import json
import os
import runpy
import sys

LIBRARIES = (
    "samq.allocation.budget",
    "samq.evaluation.lm_eval.harness",
    "samq.sensitivity.gram",
    "samq.sensitivity.measure",
    "samq.tracking.sweep_runs",
)


def next_request() -> dict | None:
    """Fork at each request: the child returns it; the parent waits for the child, and returns None at the last."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def carry_out(request: dict) -> None:
    """Become the program: its arguments, environment, folder and output."""
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
