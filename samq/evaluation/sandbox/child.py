"""The child that runs generated code: `python child.py CHANNEL MEMORY_BYTES CPU_S FILE_BYTES`.

`samq.evaluation.sandbox.run` starts it, and talks to it over the socket CHANNEL. The solution, the tests and a token come in.
One line goes out that says what could not be confined. Then goes the token if the tests ran to their end, else what went wrong.
While the top level of the solution runs, neither the tests nor the token are in this process's memory. While the tests run, the
token is not. Only the standard library is imported, so that starting takes milliseconds.
"""

import os
import resource
import sys
from collections.abc import Callable


def main(channel: int, memory_bytes: int, cpu_s: int, file_bytes: int) -> None:
    """Confine this process, run what comes over the channel, and report."""
    write, leave = os.write, os._exit  # before the code can put others in their place
    unconfined = _limit(memory_bytes, cpu_s, file_bytes) + _confine()
    write(channel, "; ".join(unconfined).encode() + b"\n")
    names = {"__name__": "solution"}
    try:
        exec(compile(_receive(channel), "<solution>", "exec"), names)
        exec(compile(_receive(channel), "<tests>", "exec"), names)
        write(channel, _receive(channel))
    except BaseException as error:  # sys.exit() in the code is a failure like others
        write(channel, f"{type(error).__name__}: {error}"[:500].encode(errors="replace"))
    leave(0)  # threads that the code left behind, and what it registered for the end, do not matter


def _limit(memory_bytes: int, cpu_s: int, file_bytes: int) -> list[str]:
    """Set the limits; returns those that this system does not have."""
    limits = {"AS": memory_bytes, "CPU": cpu_s, "FSIZE": file_bytes, "NOFILE": 64, "CORE": 0}
    refused = []
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        except (ValueError, OSError) as error:
            refused.append(f"RLIMIT_{name}: {error}")
    return refused


def _confine() -> list[str]:
    sys.path.insert(0, os.path.dirname(__file__))
    import confinement

    del sys.path[0]
    unconfined: list[str] = confinement.confine(os.getcwd())
    return unconfined


def _receive(channel: int, read: Callable[[int, int], bytes] = os.read) -> bytes:
    """One message: its length in 8 bytes, and its bytes."""

    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = read(channel, count - len(data))
            if not part:
                raise EOFError("the channel was closed")
            data += part
        return data

    return exactly(int.from_bytes(exactly(8), "big"))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
