"""What every stage has in common: cached by content in the store and in Prefect, retried for transient faults only.

A stage is a function `make(folder, **inputs)` that writes its files into `folder`. Its key is a digest of the stage's
name and version, the versions of the packages that shape its output, and the content of its inputs: records by their
digest, artifacts by their files. A path or a time never enters a key.
"""

import functools
import inspect
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import CachePolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from pydantic import BaseModel

from samq import __version__
from samq.errors import UnreachableError
from samq.progress import bar
from samq.records import Record, Toolchain, digest_of
from samq.store import Artifact, Store
from samq.llamacpp.toolchain import python_library_build

log = logging.getLogger("samq.stage")

P = ParamSpec("P")
R = TypeVar("R")

# Inputs that say where or how long, not what.
NOT_IDENTITY = frozenset({"store", "timeout_s"})
RETRY_DELAYS_S = [5.0, 60.0]


def identity(value: Any) -> Any:
    """A JSON-like stand-in for a value that is equal exactly when the content is; TypeError for what has no such."""
    match value:
        case Record() | Artifact():
            return value.digest()
        case BaseModel():
            return value.model_dump(mode="json", exclude=set(getattr(value, "NOT_IDENTITY", ())))
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple():
            return [identity(item) for item in value]
        case dict():
            return {str(key): identity(item) for key, item in value.items()}
        case _:
            raise TypeError(f"{type(value).__name__} has no content to key a cache by; pass a record or an artifact")


@dataclass
class ContentCache(CachePolicy):
    """Key of one stage's task run; while the store has the artifact whole, the same inputs give the same key."""

    stage: str = ""
    version: int = 1
    packages: tuple[str, ...] = ()

    def artifact_key(self, inputs: dict[str, Any]) -> str:
        """The store's key for these inputs."""
        return digest_of(
            {
                "stage": self.stage,
                "version": self.version,
                "packages": self._package_versions(),
                "inputs": {name: identity(value) for name, value in inputs.items() if name not in NOT_IDENTITY},
            }
        )

    def made_by(self, inputs: dict[str, Any]) -> dict[str, str]:
        """Versions of what makes the artifact: the key has them too, but hashed.

        A stage without llama.cpp's programs has the builds that made its inputs, whose content its key has.
        """
        tools: Toolchain | None = inputs.get("toolchain")
        builds = {f"{tools.version} {tools.build}"} if tools else _builds(inputs)
        llama_cpp = {"llama.cpp": ", ".join(sorted(builds))} if builds else {}
        return {"samq": __version__, "stage version": str(self.version), **self._package_versions(), **llama_cpp}

    def _package_versions(self) -> dict[str, str]:
        versions = {name: package_version(name) for name in self.packages}
        if "llama-cpp-python" in versions:  # one version is built for a GPU or not
            versions["llama-cpp-python"] += f" {python_library_build()}"
        return versions

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,
    ) -> str:
        """Prefect's key: the store's, and which making of that artifact the cached reference would refer to."""
        key, store = self.artifact_key(inputs), Store(inputs["store"])
        made = digest_of([str(store.root), store.incarnation(self.stage, key)])
        return f"{self.stage}-{key}-{made[:16]}"


def _builds(value: Any) -> set[str]:
    """The builds of llama.cpp that made the artifacts in a value."""
    match value:
        case Artifact():
            return {value.made_by["llama.cpp"]} if "llama.cpp" in value.made_by else set()
        case dict():
            return {build for item in value.values() for build in _builds(item)}
        case _:
            return set()


def is_transient(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether trying again may help: a network or file-system hiccup, and nothing a person has to put right."""
    error = state.result(raise_on_failure=False)
    kinds = (ConnectionError, TimeoutError, InterruptedError, BlockingIOError, UnreachableError)
    if transient := isinstance(error, kinds):
        log.warning("failed for now, tried again within a minute: %s", error)  # else the terminal is still until then
    return transient


def retried(name: str, run_name: str) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Decorate a function into a Prefect task that is not cached, and tried again after transient faults."""
    return task(name=name, task_run_name=run_name, **_retries(len(RETRY_DELAYS_S)))


def _retries(count: int) -> dict[str, Any]:
    """Prefect's settings for a task that is tried again after transient faults, at most so often."""
    return {"retries": count, "retry_delay_seconds": RETRY_DELAYS_S[:count], "retry_condition_fn": is_transient}


def announce(task: Task[..., Any], run: TaskRun, state: State[Any]) -> None:
    """Tell the terminal how a task ended."""
    took = (run.end_time or run.start_time) and f"{run.total_run_time.total_seconds():.1f} s"
    log.info("%s: %s", run.name, "cached" if state.name == "Cached" else f"{(state.name or '').lower()}, {took}")


def stage(
    name: str, *, version: int, run_name: str, packages: tuple[str, ...] = (), retries: int = 2
) -> Callable[[Callable[..., None]], Task[..., Artifact]]:
    """Decorate `make(folder, **inputs)` into a Prefect task `(store, **inputs) -> Artifact`."""
    policy = ContentCache(stage=name, version=version, packages=packages)

    def decorate(make: Callable[..., None]) -> Task[..., Artifact]:
        signature = inspect.signature(make)
        _, *inputs = signature.parameters.values()
        outer = inspect.Parameter("store", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Path)

        @functools.wraps(make)
        def body(*args: Any, **kwargs: Any) -> Artifact:
            bound = body.__signature__.bind(*args, **kwargs)  # type: ignore[attr-defined]
            bound.apply_defaults()
            arguments = dict(bound.arguments)
            key = policy.artifact_key(arguments)
            store = Store(arguments.pop("store"))
            artifact = store.find(name, key)
            if artifact is None:  # also when Prefect has forgotten what the store still has
                started = time.monotonic()
                with ExitStack() as publishing, store.publish(name, key, policy.made_by(arguments)) as folder:
                    make(folder, **arguments)
                    publishing.enter_context(bar(f"keep what {name} made"))  # it is read once more, for its hashes
                artifact = store.find(name, key)
                log.debug("%s %s took %.1f s", name, key[:12], time.monotonic() - started)
            assert artifact is not None, "an artifact just published is there"
            return artifact

        body.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[outer, *inputs], return_annotation=Artifact
        )
        body.__annotations__ = {**make.__annotations__, "store": Path, "return": Artifact}
        body.__annotations__.pop("folder", None)
        return Task(
            body,
            name=name,
            task_run_name=run_name,
            cache_policy=policy,
            persist_result=True,
            result_serializer="json",
            **_retries(retries),
            on_completion=[announce],
            on_failure=[announce],
        )

    return decorate
