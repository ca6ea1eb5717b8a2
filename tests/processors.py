"""Gives each of pytest-xdist's workers processors of its own, when imported; its children have the same.

Otherwise the threads of NumPy, torch and llama.cpp would wait for each other, so it comes before any of them is imported.
"""

import os

worker, workers = os.environ.get("PYTEST_XDIST_WORKER", ""), os.environ.get("PYTEST_XDIST_WORKER_COUNT", "")
if worker and hasattr(os, "sched_setaffinity"):
    processors, number = sorted(os.sched_getaffinity(0)), int(worker.removeprefix("gw"))
    os.sched_setaffinity(0, processors[number :: int(workers)] or {processors[number % len(processors)]})
