"""What the worker's container runs: `samq up` without the pages, which ends when the worker does, to be started again."""

import os
import signal
import sys
from pathlib import Path

from samq.services import worker


def main() -> None:
    """Work until the worker ends, or SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with worker(os.environ["PREFECT_API_URL"].removesuffix("/api"), Path.cwd()) as child:
        status = child.wait()
    sys.exit(status or 1)  # it should not have ended


if __name__ == "__main__":
    main()
