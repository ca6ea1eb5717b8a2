"""Running code that a model wrote, and finding out whether it passes its tests.

The code runs in a child process with a process group, an empty folder and an environment of its own. Time, memory, processor
time and file size are limited. On Linux it has no network, starts no processes, and writes no file outside its folder
(`confinement.py`). It sees Python's standard library and nothing else.

That protects the machine. The score is protected from accidents and short cuts. Only a random token counts as success, and the
child gets at it when the tests have run to their end. It is not protected from code that studies the child's stack:
tests and code share a process, as in every harness for HumanEval.
"""

import secrets
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from samq.llamacpp.process import kill_group

_CHILD = Path(__file__).with_name("child.py")
_NO_REPORT = "unknown, as the child ended before it could say"
_LONGEST_REPORT_BYTES = 16384  # what the child says is short; more is the code's own writing


class CodeLimits(BaseModel):
    """What a piece of generated code may use up."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float = Field(default=10, gt=0, description="time from start to end; processor time as well, rounded up")
    memory_bytes: int = Field(default=2**30, ge=2**26, description="address space, Python's own 20 MB included")
    file_bytes: int = Field(default=2**24, ge=0, description="largest file that may be written")


@dataclass(frozen=True)
class Outcome:
    """What became of one piece of code."""

    passed: bool
    error: str | None  # why it did not pass
    unconfined: str  # what this system could not keep it from; empty: nothing


def run_tests(solution: str, tests: str, limits: CodeLimits | None = None) -> Outcome:
    """Run the solution, then the tests in the same namespace; passed is what gets to the end of both."""
    limits = limits or CodeLimits()
    token = secrets.token_bytes(32)
    deadline = time.monotonic() + limits.seconds
    ours, theirs = socket.socketpair()
    with ours, tempfile.TemporaryDirectory(prefix="samq-code-") as folder:
        with theirs:
            child = _start(theirs, folder, limits)
        try:
            report = _converse(ours, [solution.encode(errors="replace"), tests.encode(), token], deadline)
            in_time = _ends(child, deadline)
        finally:
            kill_group(child)
    line, reported, answer = report.partition(b"\n")
    unconfined = line.decode(errors="replace") if reported else _NO_REPORT
    if not in_time:
        error: str | None = f"was stopped after {limits.seconds:g} s"
    elif secrets.compare_digest(answer, token):
        error = None
    else:
        error = answer.decode(errors="replace") or f"ended by itself with code {child.returncode}"
    return Outcome(passed=error is None, error=error, unconfined=unconfined)


def isolation() -> str:
    """What keeps generated code from harm on this machine, in words; found out once."""
    if (unconfined := _unconfined()) == _NO_REPORT:
        _unconfined.cache_clear()
    return f"not confined: {unconfined}" if unconfined else "no network, no new processes, files in its own folder only"


@lru_cache
def _unconfined() -> str:
    return run_tests("", "").unconfined


def _start(channel: socket.socket, folder: str, limits: CodeLimits) -> subprocess.Popen[bytes]:
    cpu_s = int(-(-limits.seconds // 1))
    numbers = (channel.fileno(), limits.memory_bytes, cpu_s, limits.file_bytes)
    return subprocess.Popen(
        # no site-packages, no folder of the script, no bytecode written; not -I, which would ignore PYTHONHASHSEED
        [sys.executable, "-s", "-S", "-P", "-B", _CHILD, *map(str, numbers)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={"HOME": folder, "TMPDIR": folder, "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"},
        pass_fds=(channel.fileno(),),
        start_new_session=True,
    )


def _converse(channel: socket.socket, messages: list[bytes], deadline: float) -> bytes:
    """Send the messages, and return what comes back until the child closes the channel or the time is over."""
    received = b""
    try:
        channel.settimeout(max(deadline - time.monotonic(), 0.001))
        channel.sendall(b"".join(len(message).to_bytes(8, "big") + message for message in messages))
        while len(received) < _LONGEST_REPORT_BYTES:
            channel.settimeout(max(deadline - time.monotonic(), 0.001))
            part = channel.recv(_LONGEST_REPORT_BYTES)
            if not part:
                break
            received += part
    except (TimeoutError, ConnectionError):  # or the child ended in the middle of it
        pass
    return received


def _ends(child: subprocess.Popen[bytes], deadline: float) -> bool:
    try:
        child.wait(timeout=max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        return False
    return True
