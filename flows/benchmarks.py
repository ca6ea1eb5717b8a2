"""Benchmarks of the candidates that could still be chosen."""

from flows.gather import Gather
from flows.parameters import RequantizeParameters
from samq.sweep.benchmarking import Candidate
from samq.sweep.sweep import Sweep
from samq.workspace import Workspace
from tasks.benchmark import AvailableBenchmarks, EngineSettings, benchmark, join_benchmarks


def benchmark_finalists(
    at: Workspace, sweep: Sweep, tasks: AvailableBenchmarks, parameters: RequantizeParameters
) -> Sweep:
    """The sweep with every task's figures of every finalist; a task that fails on one is missing there."""
    wanted, engine = parameters.benchmarks, EngineSettings.of(parameters.evaluation)
    if not wanted.tasks:
        return sweep
    finalists = [result for result in sweep.results if result.name in sweep.finalists(wanted.candidates)]
    futures = {}
    for result in finalists:
        candidate = Candidate(name=result.name, gguf=result.gguf, sha256=result.model.sha256)
        for task, digest in tasks.digests.items():
            futures[result.name, task] = benchmark.submit(at, candidate, task, digest, wanted.settings, engine)
    answers = Gather.keeping_errors(futures)
    return join_benchmarks(sweep, [result.name for result in finalists], answers, tasks.unavailable)
