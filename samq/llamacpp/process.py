"""Child processes that end with their time limit or their parent, and whose output is logged."""

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from samq.errors import ToolError
from samq.llamacpp.reason import reason_in

PROGRAM_TIMEOUT_S = 6 * 3600.0  # of one program of llama.cpp
FULL_BYTES = 2**20  # a disk with less free space counts as full: the programs' files are larger
# Looked up here: between fork and exec, loading a library could wait for a lock that another thread held.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux, in the child, for SIGKILL when the parent dies, so that `kill -9` of a flow leaves no orphan."""
    if _prctl:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run(
    command: Sequence[str | Path],
    *,
    log: Path,
    timeout_s: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
    stack: int = 0,
) -> str:
    """Run a program in its own process group, write its stdout and stderr to `log`, and return that text.

    `env` is added to this process's environment. `on_line` is called with each line while the program runs. Raises
    ToolError if the program is missing, exits non-zero (with the reason in its log), or runs longer than `timeout_s`, which
    kills its process group.

    `stack` is the least number of bytes of stack that the program gets, as far as the system allows.
    """
    name = Path(command[0]).name
    try:
        with log.open("wb") as output:
            child = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**os.environ, **(env or {})},
                start_new_session=True,
                preexec_fn=partial(begin_child, stack),
            )
    except OSError as error:
        raise ToolError(f"cannot start {command[0]}: {error.strerror}; `samq doctor` says what is missing") from error
    reported = 0  # bytes of the log that `on_line` has been given
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            try:
                child.wait(timeout=max(0.0, min(0.2, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                if time.monotonic() >= deadline:
                    raise ToolError(
                        f"{name} was stopped after {timeout_s:.0f} s; raise its limit (log: {log})"
                    ) from None
            if on_line:
                unreported = log.read_bytes()[reported:]
                whole_lines = unreported[: unreported.rfind(b"\n") + 1]
                reported += len(whole_lines)
                for line in whole_lines.decode(errors="replace").splitlines():
                    on_line(line)
            if child.returncode is not None:
                break
    finally:
        kill_group(child)
    text = log.read_text(errors="replace")
    if child.returncode != 0:
        reason = reason_in(text)
        raise ToolError(f"{name} {_ending(child.returncode)}: {reason}{_advice(log.parent, reason)} (log: {log})")
    return text


def begin_child(stack: int = 0) -> None:
    """In the child, before the program: end with the parent, and have this much stack."""
    die_with_parent()
    if stack:
        allowed, most = resource.getrlimit(resource.RLIMIT_STACK)
        if allowed != resource.RLIM_INFINITY and allowed < stack:
            wanted = stack if most == resource.RLIM_INFINITY else min(stack, most)
            resource.setrlimit(resource.RLIMIT_STACK, (wanted, most))


def _ending(code: int) -> str:
    return f"failed with exit code {code}" if code > 0 else f"was killed by signal {-code} ({signal.strsignal(-code)})"


def _advice(folder: Path, reason: str) -> str:
    """What to do about a full disk, which programs hardly ever report themselves, and about llama.cpp's own assertions."""
    if shutil.disk_usage(folder).free < FULL_BYTES:
        return f"; the disk of {folder} is full, free some space"
    if "GGML_ASSERT" in reason:
        return "; this llama.cpp cannot do that with this model: choose another model, or take a newer llama.cpp"
    return ""


def kill_group(child: subprocess.Popen[bytes]) -> None:
    """Kill the processes that are left of the child's process group, and reap the child."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
