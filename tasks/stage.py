"""What every stage has in common: cached by content in the store and in Prefect, retried for transient faults only.

A stage is a function `make(at, folder, **inputs)` that writes its files into `folder`. Its key is a digest of the
stage's name and version, the versions of the packages that shape its output, and its inputs. Inputs count by content: records by
their digest, artifacts by their files. What the stage names of the workspace counts, too. A path or a time never enters a key.
"""

import functools
import inspect
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar
from uuid import uuid4

from prefect import Task
from prefect.cache_policies import CachePolicy
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.futures import PrefectConcurrentFuture
from prefect.states import Completed, Failed
from pydantic import BaseModel

from samq import __version__
from samq.errors import UnreachableError
from samq.llamacpp.toolchain import python_library_build
from samq.progress import bar
from samq.records import Record, digest_of
from samq.store import Artifact, Store
from samq.store_cache import within_limit
from samq.workspace import Workspace

log = logging.getLogger("samq.stage")

P = ParamSpec("P")
R = TypeVar("R")

RETRY_DELAYS_S = [5.0, 60.0]


class LocalTask(Task[P, R]):
    """A task run of Prefect's inside a flow run, and a plain function outside of one.

    So commands and benchmarks call the same pipeline as the flow, with the same store and keys, and start no server.
    """

    if not TYPE_CHECKING:  # the types are those of Task

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Run the task and return its result."""
            return super().__call__(*args, **kwargs) if FlowRunContext.get() else self.fn(*args, **kwargs)

        def submit(self, *args: Any, **kwargs: Any) -> Any:
            """Start the task and return its future; outside of a flow run it has ended when this returns."""
            if FlowRunContext.get():
                return super().submit(*args, **kwargs)
            future: Future[State] = Future()
            try:
                future.set_result(Completed(data=self.fn(*args, **kwargs)))
            except Exception as error:
                future.set_result(Failed(data=error, message=str(error)))
            return PrefectConcurrentFuture(uuid4(), future)


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


def _flat(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs by name; a dataclass (`Target`, `TorchModel`) stands for its fields."""
    flat: dict[str, Any] = {}
    for name, value in inputs.items():
        parts = {f.name: getattr(value, f.name) for f in fields(value)} if is_dataclass(value) else {name: value}
        if clash := flat.keys() & parts.keys():
            raise TypeError(f"two inputs of a stage are called {clash.pop()}; rename one")
        flat |= parts
    return flat


@dataclass
class ContentCache(CachePolicy):
    """Key of one stage's task run; while the store has the artifact whole, the same inputs give the same key."""

    stage: str = ""
    version: int = 1
    keyed_by: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    unless_empty: tuple[str, ...] = ()

    def artifact_key(self, at: Workspace, inputs: Mapping[str, Any]) -> str:
        """The store's key for these inputs."""
        content = _flat(inputs) | at.contents(self.keyed_by)
        content = {name: value for name, value in content.items() if value or name not in self.unless_empty}
        return digest_of(
            {
                "stage": self.stage,
                "version": self.version,
                "packages": self._package_versions(),
                "inputs": {name: identity(value) for name, value in content.items()},
            }
        )

    def made_by(self, at: Workspace, inputs: Mapping[str, Any]) -> dict[str, str]:
        """Versions of what makes the artifact: the key has them too, but hashed.

        A stage that does not run llama.cpp's programs has the builds that made its inputs, whose content its key has.
        """
        tools = at.toolchain
        builds = {f"{tools.version} {tools.build}"} if "toolchain" in self.keyed_by else _builds(_flat(inputs))
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
        at, others = inputs["at"], {name: value for name, value in inputs.items() if name != "at"}
        key, store = self.artifact_key(at, others), Store(at.store)
        incarnation = digest_of([str(store.root), store.incarnation(self.stage, key)])
        return f"{self.stage}-{key}-{incarnation[:16]}"


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
    """Whether trying again may help: a network or file-system hiccup, and nothing that the user has to put right."""
    error = state.result(raise_on_failure=False)
    kinds = (ConnectionError, TimeoutError, InterruptedError, BlockingIOError, UnreachableError)
    if transient := isinstance(error, kinds):
        log.warning("failed for now, tried again within a minute: %s", error)  # else the terminal is still until then
    return transient


def step(name: str, run_name: str | None = None, *, retries: int = 0) -> Callable[[Callable[P, R]], LocalTask[P, R]]:
    """Decorate a function into a task that is not cached, and tried again after transient faults at most `retries` times."""

    def decorate(function: Callable[P, R]) -> LocalTask[P, R]:
        return LocalTask(function, name=name, task_run_name=run_name, **_retries(retries))

    return decorate


def _retries(count: int) -> dict[str, Any]:
    """Prefect's settings for a task that is tried again after transient faults, at most so often."""
    return {"retries": count, "retry_delay_seconds": RETRY_DELAYS_S[:count], "retry_condition_fn": is_transient}


def announce(task: Task[..., Any], run: TaskRun, state: State[Any]) -> None:
    """Tell the terminal how a task ended."""
    took = (run.end_time or run.start_time) and f"{run.total_run_time.total_seconds():.1f} s"
    log.info("%s: %s", run.name, "cached" if state.name == "Cached" else f"{(state.name or '').lower()}, {took}")


def stage(
    name: str,
    *,
    version: int,
    run_name: str,
    keyed_by: tuple[str, ...] = (),
    packages: tuple[str, ...] = (),
    unless_empty: tuple[str, ...] = (),
    retries: int = 2,
    goes_on: bool = False,
) -> Callable[[Callable[Concatenate[Workspace, Path, P], None]], LocalTask[Concatenate[Workspace, P], Artifact]]:
    """Decorate `make(at, folder, *inputs)` into a task `(at, *inputs) -> Artifact`.

    `keyed_by` names what of the workspace the output depends on (see `Workspace.contents`), `packages` the Python packages. An
    input named in `unless_empty` is in the key only if it holds something, so that it leaves the keys of before as they were.
    A stage that `goes_on` where a killed one was has a folder for that, `at.scratch`.
    """
    policy = ContentCache(stage=name, version=version, keyed_by=keyed_by, packages=packages, unless_empty=unless_empty)

    def decorate(
        make: Callable[Concatenate[Workspace, Path, P], None],
    ) -> LocalTask[Concatenate[Workspace, P], Artifact]:
        at_parameter, _, *input_parameters = inspect.signature(make).parameters.values()
        assert at_parameter.name == "at", "the name by which `ContentCache.compute_key` finds the workspace"
        signature = inspect.Signature([at_parameter, *input_parameters], return_annotation=Artifact)

        @functools.wraps(make)
        def body(at: Workspace, /, *args: P.args, **kwargs: P.kwargs) -> Artifact:
            bound = signature.bind(at, *args, **kwargs)
            bound.apply_defaults()
            inputs = {name: value for name, value in bound.arguments.items() if name != "at"}
            key, store = policy.artifact_key(at, inputs), Store(at.store)
            with within_limit(store):
                return found_or_made(at, store, key, inputs, *args, **kwargs)

        def found_or_made(
            at: Workspace, store: Store, key: str, inputs: dict[str, Any], /, *args: P.args, **kwargs: P.kwargs
        ) -> Artifact:
            artifact = store.find(name, key)
            if artifact is None:  # also when Prefect has forgotten what the store still has
                started = time.monotonic()
                with (
                    store.scratch(name, key) if goes_on else nullcontext() as scratch,
                    ExitStack() as publishing,
                    store.publish(name, key, policy.made_by(at, inputs)) as folder,
                ):
                    make(replace(at, scratch=scratch), folder, *args, **kwargs)
                    publishing.enter_context(bar(f"keep what {name} made"))  # it is read once more, for its hashes
                artifact = store.find(name, key)
                log.debug("%s %s took %.1f s", name, key[:12], time.monotonic() - started)
            assert artifact is not None, "an artifact just published is there"
            return artifact

        body.__signature__ = signature  # type: ignore[attr-defined]
        body.__annotations__ = {**make.__annotations__, "return": Artifact}
        body.__annotations__.pop("folder", None)
        return LocalTask(
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
