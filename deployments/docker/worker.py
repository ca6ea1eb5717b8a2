"""What the worker's container runs: `samq up` without the pages, which ends when the worker does, to be started again."""

import os
import signal
import sys
from pathlib import Path

import psutil

from samq.services import worker

PATIENCE_S = 30


def main() -> None:
    """Work until the worker ends, or SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with worker(os.environ["PREFECT_API_URL"].removesuffix("/api"), Path.cwd()):
        (child,) = psutil.Process().children()
        try:
            status = child.wait()
        except SystemExit:
            end_runs(child)
            raise
    sys.exit(status or 1)  # it should not have ended


def end_runs(worker: psutil.Process) -> None:
    """End a worker's runs, which say so on Prefect's page; ended by the worker they would be "Running" there for ever."""
    runs = worker.children(recursive=True)
    for run in runs:
        run.terminate()
    psutil.wait_procs(runs, PATIENCE_S)


if __name__ == "__main__":
    main()
