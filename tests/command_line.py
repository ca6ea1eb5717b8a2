"""The command line in a process of its own, as a person meets it."""

import os
import subprocess
import sys
from pathlib import Path


def samq(*arguments, home, preexec_fn=None, **environment):
    """Run the command line with a SAMQ folder of its own."""
    command = [sys.executable, "-m", "samq.cli", *arguments]
    return run(command, home=home, preexec_fn=preexec_fn, **environment)


def run(command, *, home, preexec_fn=None, **environment):
    """Run a program with a SAMQ folder of its own."""
    env = {**os.environ, "SAMQ_HOME": str(home), "COLUMNS": "400", **environment}
    root = Path(__file__).parents[1]
    return subprocess.run(
        [*map(str, command)], env=env, capture_output=True, text=True, check=False, cwd=root, preexec_fn=preexec_fn
    )


def refused(done, message):
    """It said so in one sentence and exited with code 2."""
    assert done.returncode == 2, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("samq: ")]
    assert len(said) == 1 and message in said[0], done.stderr
    assert "Traceback" not in done.stderr
    return True
