"""The command line in a process of its own, as a person meets it."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODULE = "samq.cli"


class Preloaded:
    """Runs modules in processes that find the libraries imported (`tests/preloaded.py`); one after another."""

    def __init__(self):
        self._server = None

    def run(self, module, arguments, environment) -> subprocess.CompletedProcess:
        if self._server is None:
            command = [sys.executable, "-m", "tests.preloaded"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._server = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        with tempfile.TemporaryDirectory() as folder:
            output = {name: f"{folder}/{name}" for name in ("stdout", "stderr")}
            request = {"module": module, "arguments": arguments, "environment": environment, "folder": str(ROOT)}
            try:
                print(json.dumps(request | output), file=self._server.stdin, flush=True)
                code = int(self._server.stdout.readline())
            except BaseException:  # a test's time is over, say
                self._server.kill()
                self._server = None
                raise
            texts = {name: Path(path).read_text() for name, path in output.items()}
        return subprocess.CompletedProcess([module, *arguments], code, **texts)


preloaded = Preloaded()


def samq(*arguments, home, preexec_fn=None, fresh=False, **environment):
    """Run the command line with a SAMQ folder of its own; `fresh` lets the process import its libraries itself."""
    if fresh or preexec_fn:
        command = [sys.executable, "-m", MODULE, *arguments]
        return run(command, home=home, preexec_fn=preexec_fn, **environment)
    return preloaded.run(MODULE, [*map(str, arguments)], environment_of(home, environment))


def environment_of(home, more):
    return {**os.environ, "SAMQ_HOME": str(home), "COLUMNS": "400", **more}


def run(command, *, home, preexec_fn=None, **environment):
    """Run a program with a SAMQ folder of its own."""
    env = environment_of(home, environment)
    return subprocess.run(
        [*map(str, command)], env=env, capture_output=True, text=True, check=False, cwd=ROOT, preexec_fn=preexec_fn
    )


def refused(done, message):
    """It said so in one sentence and exited with code 2."""
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("samq: ")]
    assert len(said) == 1 and message in said[0], done.stderr
    assert "Traceback" not in done.stderr
    return True
