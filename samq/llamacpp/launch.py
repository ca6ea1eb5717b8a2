"""Becomes a program that ends with its parent: `python launch.py PARENT STACK_BYTES PROGRAM ARGUMENT...`.

`samq.llamacpp.process.start` runs it. Python could do the same between fork and exec (`preexec_fn`). But there a lock that
another thread held can stop it for ever, and the parent with it. Only the standard library is imported, so that it takes
milliseconds.
"""

import ctypes
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1
_CANNOT_RUN = 126  # as shells have it


def main(parent: int, stack_bytes: int, program: str, arguments: list[str]) -> None:
    """Ask Linux for SIGKILL when the parent dies, take as much stack as is wanted and allowed, and run the program."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        sys.exit(_CANNOT_RUN)
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, and programs inherit that
        signal.signal(ignored, signal.SIG_DFL)
    allowed, most = resource.getrlimit(resource.RLIMIT_STACK)
    if allowed != resource.RLIM_INFINITY and allowed < stack_bytes:
        wanted = stack_bytes if most == resource.RLIM_INFINITY else min(stack_bytes, most)
        resource.setrlimit(resource.RLIMIT_STACK, (wanted, most))
    try:
        os.execvp(program, [program, *arguments])
    except OSError as error:
        print(f"cannot run {program}: {error.strerror}", file=sys.stderr)
        sys.exit(_CANNOT_RUN)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
