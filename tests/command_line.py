"""The command line in a process of its own, as a person meets it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def samq(*arguments, home, preexec_fn=None, **environment):
    """Run the command line with a SAMQ folder of its own."""
    command = [sys.executable, "-m", "samq.cli", *arguments]
    return run(command, home=home, preexec_fn=preexec_fn, **environment)


def run(command, *, home, preexec_fn=None, **environment):
    """Run a program with a SAMQ folder of its own."""
    env = environment_of(home, environment)
    return subprocess.run(
        [*map(str, command)], env=env, capture_output=True, text=True, check=False, cwd=ROOT, preexec_fn=preexec_fn
    )


def environment_of(home, more):
    return {**os.environ, "SAMQ_HOME": str(home), "COLUMNS": "400", **more}


def forked_samq(*arguments, home, **environment):
    """As `samq`, in a process that finds the libraries imported (`tests/preloaded.py`): for many commands in a row."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = {name: f"{folder}/{name}" for name in ("stdout", "stderr")}
        request = {"module": "samq.cli", "arguments": [*map(str, arguments)], "folder": str(ROOT)}
        code = _preloaded.ask({**request, "environment": environment_of(home, environment), **outputs})
        texts = {name: Path(path).read_text() for name, path in outputs.items()}
    return subprocess.CompletedProcess(request["arguments"], code, **texts)


class _Preloaded:
    """The process that commands are forked from: started by the first, ended with its standard input."""

    def __init__(self):
        self._process = None

    def ask(self, request) -> int:
        if self._process is None:
            command = [sys.executable, "-m", "tests.preloaded"]
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            return int(self._process.stdout.readline())
        except BaseException:  # the test's time is over, say: the answer of this request is not that of the next
            self._process.kill()
            self._process = None
            raise


_preloaded = _Preloaded()


def refused(done, message):
    """It said so in one sentence and exited with code 2."""
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("samq: ")]
    assert len(said) == 1 and message in said[0], done.stderr
    assert "Traceback" not in done.stderr
    return True
