"""The program of the worker's container: `samq up` without the pages. It ends when the worker ends; Docker restarts it."""

import os
import signal
import sys
from pathlib import Path

from samq.services import worker


def main() -> None:
    """Run the worker until it ends, or until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with worker(os.environ["PREFECT_API_URL"].removesuffix("/api"), Path.cwd()) as child:
        status = child.wait()
    sys.exit(status or 1)  # the worker should never end by itself


if __name__ == "__main__":
    main()
