"""Child processes that end with their time limit or their parent, and whose output is logged."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from samq.errors import ToolError
from samq.llamacpp.reason import reason_in

PROGRAM_TIMEOUT_S = 6 * 3600.0  # of one program of llama.cpp
FULL_BYTES = 2**20  # a disk with less free space counts as full: the programs' files are larger
_LAUNCH = Path(__file__).with_name("launch.py")


def start(command: Sequence[str | Path], *, stack: int = 0, **options: Any) -> subprocess.Popen[bytes]:
    """Start a program in a process group of its own, which on Linux dies with the thread that started it.

    So `kill -9` of a flow leaves no orphan. `stack` is the least number of bytes of stack that the program gets, as far as the
    system allows. `options` are those of `subprocess.Popen`. Raises OSError if the program is missing or not executable.
    """
    program = str(command[0])
    if not shutil.which(program):
        code = errno.EACCES if os.path.exists(program) else errno.ENOENT
        raise OSError(code, os.strerror(code), program)
    launched = [sys.executable, "-I", "-S", "-B", _LAUNCH, os.getpid(), stack, *command]
    return subprocess.Popen(
        [str(part) for part in launched], stdin=subprocess.DEVNULL, start_new_session=True, **options
    )


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

    `stack` is as for `start`.
    """
    name = Path(command[0]).name
    try:
        with log.open("wb") as output:
            child = start(
                command,
                stack=stack,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**os.environ, **(env or {})},
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
