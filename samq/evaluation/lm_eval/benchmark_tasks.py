"""Finding and opening lm-eval's tasks, and saying in one sentence what keeps one from being run."""

import difflib
import inspect
import logging
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from samq.errors import SamqError
from samq.evaluation.settings import BenchmarkSettings
from samq.evaluation.tasks import FOLDER, judging
from samq.markdown import one_line
from samq.progress import Progress, silent
from samq.records import digest_of

_HUB = ("datasets", "huggingface_hub", "httpx", "requests", "fsspec", "aiohttp")  # whose errors are of data


class UnavailableError(SamqError):
    """A task that is as it should be, but needs data or a package that is not to be had here and now."""


@dataclass(frozen=True)
class Benchmark:
    """What a name in the settings stands for, opened: a task, or the tasks of a group or a tag."""

    name: str
    tasks: dict[str, Task]
    groups: dict[str, Group]

    @property
    def runs_code(self) -> bool:
        """Whether a task of it runs what the model writes."""
        return any(map(_runs_code, self.tasks.values()))

    @property
    def confines_code(self) -> bool:
        """Whether all code of it is run by `samq.evaluation.sandbox.run`."""
        judges = [task.get_config("process_results") for task in self.tasks.values() if _runs_code(task)]
        return all(getattr(judge, "__module__", None) == judging.__name__ for judge in judges)

    @property
    def pools_items(self) -> bool:
        """Whether it is a group whose figures are means over all items of its tasks, so that items can stand for it."""
        group = self.groups.get(self.name)
        parts = group.aggregate_metric_list if group else None
        return bool(parts) and all(part.weight_by_size and part.aggregation == "mean" for part in parts or ())

    def digest(self) -> str:
        """SHA-256 (hex) of what its figures depend on apart from the model: configurations, items, lm-eval's version.

        A function of a configuration is taken with all of its file, which may hold what it calls; where a file lies is
        left out.
        """
        described = {name: _describe(task) for name, task in sorted(self.tasks.items())}
        groups = {name: _plain(group.to_dict()) for name, group in sorted(self.groups.items())}
        return digest_of({"lm_eval": version("lm-eval"), "tasks": described, "groups": groups})


class TaskLibrary:
    """All tasks that can be named: SAMQ's, those in folders of the user's, and lm-eval's own."""

    def __init__(self, folders: Sequence[Path] = ()) -> None:
        """Raises SamqError if a folder is missing, or a .yaml file in it is malformed."""
        for folder in folders:
            if not folder.is_dir():
                raise SamqError(f"there is no folder of tasks at {folder}; check task_folders")
            for path in sorted(folder.glob("**/*.yaml")):
                _read(path)
        self._folders = [FOLDER, *folders]
        self._near = TaskManager(include_defaults=False, include_path=self._folders)

    def open(self, name: str, settings: BenchmarkSettings) -> Benchmark:
        """Open a task, a group, a tag or a task file, with its data.

        Raises SamqError if there is none of that name, its file is malformed, its data cannot be had, or it runs code
        and the settings do not allow that.
        """
        is_file = name.endswith((".yaml", ".yml"))
        with quiet(), code_allowed(settings.run_code):
            try:
                manager, config = self._manager(name, is_file)
                # before it is loaded: lm-eval's own code tasks run code as they are imported
                if not settings.run_code and _says_unsafe(manager, config):
                    raise _code_refused(name)
                found = manager.load([name])
            except SamqError:
                raise
            except Exception as error:  # a task is a program of its author's
                raise _explained(name, error) from error
        benchmark = Benchmark(Path(name).stem if is_file else name, found["tasks"], found.get("groups", {}))
        if benchmark.runs_code and not settings.run_code:
            raise _code_refused(name)
        return benchmark

    def _manager(self, name: str, is_file: bool) -> tuple[TaskManager, dict[str, Any]]:
        """Who can open it, and its configuration.

        lm-eval's own tasks, 14,000 files, are looked through only if need be: it takes six seconds.
        """
        if is_file:
            config = _read(Path(name))
            if not isinstance(config.get("group", config.get("task")), str):
                raise SamqError(f"{name} names no task; give it a line `task: NAME`")
        else:
            entry = self._near.task_index.get(name)
            config = (entry.cfg if entry else None) or {"group": name, "task": [name]}  # a tag, or an unknown name
        if "group" not in config or self._are_near(config.get("task") or []):
            return self._near, config
        manager = _lm_evals() if self._folders == [FOLDER] else TaskManager(include_path=self._folders)
        if not is_file and name not in manager.task_index:
            raise SamqError(f"there is no task {name!r}; {_nearest(name, manager.all_tasks)}")
        return manager, config if is_file else _config(manager, name)

    def _are_near(self, members: Sequence[Any]) -> bool:
        """Whether all members of a group are known without lm-eval's own tasks."""
        for member in members:
            name = member.get("group", member.get("task")) if isinstance(member, Mapping) else member
            entry = self._near.task_index.get(name)
            if (
                entry is None
                or entry.cfg is None
                or ("group" in entry.cfg and not self._are_near(entry.cfg.get("task") or []))
            ):
                return False
        return True


@lru_cache
def _lm_evals() -> TaskManager:
    """SAMQ's tasks and lm-eval's own."""
    return TaskManager(include_path=FOLDER)


def check_benchmarks(settings: BenchmarkSettings, progress: Progress = silent) -> tuple[dict[str, str], dict[str, str]]:
    """The digest of each task that can be run, and for each other one why it cannot: as now, before a long run.

    Raises SamqError for what a person has to correct: an unknown task, a malformed file, a missing folder.
    """
    library = TaskLibrary(settings.task_folders)
    digests, missing = {}, {}
    for done, name in enumerate(settings.tasks):
        progress(done, len(settings.tasks))
        with seeded(settings.seed), quiet():
            try:
                digests[name] = library.open(name, settings).digest()
            except UnavailableError as error:
                missing[name] = str(error)
    return digests, missing


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Python's and NumPy's global generators as lm-eval seeds them, for tasks that shuffle; put back afterwards."""
    states = random.getstate(), np.random.get_state()
    random.seed(DEFAULT_RANDOM_SEED if seed is None else seed)
    np.random.seed(DEFAULT_OTHER_SEED if seed is None else seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's remarks about a task, which are for its author, and the bars of `datasets`; errors stay."""
    log = logging.getLogger("lm_eval")
    level, bars = log.level, datasets.are_progress_bars_disabled()
    log.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def code_allowed(allowed: bool) -> Iterator[None]:
    """Tell Hugging Face's `code_eval`, which lm-eval's own code tasks use, what the user said."""
    before = os.environ.pop("HF_ALLOW_CODE_EVAL", None)
    if allowed:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HF_ALLOW_CODE_EVAL", None)
        if before is not None:
            os.environ["HF_ALLOW_CODE_EVAL"] = before


def _read(path: Path) -> dict[str, Any]:
    """A task file, its functions unresolved."""
    if not path.is_file():
        raise SamqError(f"there is no task file at {path}; check the path")
    try:
        return load_yaml(path, resolve_func=False)
    except Exception as error:  # of PyYAML, or of lm-eval about what it includes
        raise SamqError(f"{path} is no task file ({one_line(str(error))}); correct it") from error


def _config(manager: TaskManager, name: str) -> dict[str, Any]:
    """The configuration of a task or a group, its functions unresolved; a tag's is that of a group of its tasks."""
    entry = manager.task_index.get(name)
    if entry is None:
        return {}
    return entry.cfg or {"group": name, "task": sorted(entry.tags)}


def _says_unsafe(manager: TaskManager, config: Mapping[str, Any]) -> bool:
    """Whether a configuration, or that of a member of the group, says that code of the model's is run."""
    if config.get("unsafe_code"):
        return True
    for member in config.get("task") or () if "group" in config else ():
        if isinstance(member, Mapping) and _says_unsafe(manager, member):
            return True
        name = member.get("task") if isinstance(member, Mapping) else member
        if isinstance(name, str) and _says_unsafe(manager, _config(manager, name)):
            return True
    return False


def _code_refused(name: str) -> SamqError:
    return SamqError(f"{name} runs code that the model writes; allow it with run_code, or leave it out")


def _runs_code(task: Task) -> bool:
    return bool(getattr(task, "UNSAFE_CODE", False))


def _explained(name: str, error: Exception) -> SamqError:
    """What a person can do about an error that opening a task raised."""
    reason = f"{type(error).__name__}: {one_line(str(error))}"
    cause = error.__cause__ or error
    if isinstance(cause, ImportError) and cause.name:
        return UnavailableError(f"{name} needs the Python package {cause.name}; install it")
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _HUB:
        return UnavailableError(
            f"the data of {name} cannot be had ({reason}); connect to the network, check its file, or choose a task that "
            f"SAMQ carries (samq_...)"
        )
    return SamqError(f"{name} is no task that lm-eval can open ({reason}); correct its file")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"nearest are {', '.join(near)}" if near else "`samq lm-eval ls tasks` lists all"


def _describe(task: Task) -> dict[str, Any]:
    """A task's configuration and all its documents, wherever these came from."""
    config = _plain(task.dump_config())
    config.pop("dataset_kwargs", None)
    config.get("metadata", {}).pop("config_source", None)
    examples = task.sampler.df if hasattr(task, "sampler") else []
    return {
        "config": config,
        "version": str(task.VERSION),
        "items": _digest(task.eval_docs),
        "examples": _digest(examples),
    }


def _digest(documents: Iterable[Any]) -> str:
    return digest_of([_plain(document) for document in documents])


def _plain(value: Any) -> Any:
    """A value as JSON has it: functions by their name and file, what else JSON lacks as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if callable(value):
        try:
            return f"{value.__qualname__} of {Path(inspect.getsourcefile(value) or '').read_text()}"
        except (OSError, TypeError, AttributeError):
            return getattr(value, "__qualname__", type(value).__qualname__)
    return value if value is None or isinstance(value, str | int | bool) else str(value)
