"""Waiting for submitted stages: what ended well goes on, what failed is kept as a Failure."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

from prefect.futures import PrefectFuture, wait

from samq.store import Artifact
from samq.sweep.selection import Failure

Key = TypeVar("Key", bound=Hashable)


class Gather:
    """Waits for futures; `failures` lists what was lost, and at which stage."""

    def __init__(self) -> None:
        """Nothing is lost yet."""
        self.failures: list[Failure] = []

    def __call__(self, stage: str, futures: Mapping[str, PrefectFuture[Artifact]]) -> dict[str, Artifact]:
        """Name -> artifact of the stages that ended well."""
        outcomes = self.keeping_errors(futures)
        for name, outcome in outcomes.items():
            if isinstance(outcome, Exception):
                self.lose(name, stage, str(outcome))
        return {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, Artifact)}

    def lose(self, name: str, stage: str, reason: str) -> None:
        """Count something as lost."""
        self.failures.append(Failure(name, stage, reason))

    @staticmethod
    def keeping_errors(futures: Mapping[Key, PrefectFuture[Artifact]]) -> dict[Key, Artifact | Exception]:
        """Key -> artifact, or the error that its stage ended with."""
        wait(list(futures.values()))
        outcomes: dict[Key, Artifact | Exception] = {}
        for key, future in futures.items():
            outcome: object = future.result(raise_on_failure=False)
            outcomes[key] = outcome if isinstance(outcome, Artifact | Exception) else RuntimeError(str(outcome))
        return outcomes
