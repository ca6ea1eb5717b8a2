"""Finds and opens lm-eval's tasks, and says in one sentence why a task cannot run."""

import difflib
import inspect
import logging
import os
import random
import time
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

from samq.data.hub import is_unreachable
from samq.errors import SamqError
from samq.evaluation.settings import BenchmarkSettings
from samq.evaluation.tasks import FOLDER, judging
from samq.markdown import one_line
from samq.progress import Progress, silent
from samq.records import digest_of

logger = logging.getLogger(__name__)

# Packages whose errors mean that a task's data could not be loaded.
_HUB = ("datasets", "huggingface_hub", "httpx", "requests", "fsspec", "aiohttp")


class UnavailableError(SamqError):
    """The task is correct, but its data or a package that it needs is not available here and now."""


@dataclass(frozen=True)
class Benchmark:
    """An opened task, or the opened tasks of a group or a tag, under the name that the settings use."""

    name: str
    tasks: dict[str, Task]
    groups: dict[str, Group]

    @property
    def runs_code(self) -> bool:
        """Whether one of its tasks runs code that the model writes."""
        return any(map(_runs_code, self.tasks.values()))

    @property
    def confines_code(self) -> bool:
        """Whether `samq.evaluation.sandbox.run` runs all its code."""
        judges = [task.get_config("process_results") for task in self.tasks.values() if _runs_code(task)]
        return all(getattr(judge, "__module__", None) == judging.__name__ for judge in judges)

    @property
    def pools_items(self) -> bool:
        """Whether it is a group whose metrics are means over all items of its tasks, so that the items represent it."""
        group = self.groups.get(self.name)
        parts = group.aggregate_metric_list if group else None
        return bool(parts) and all(part.weight_by_size and part.aggregation == "mean" for part in parts or ())

    def digest(self) -> str:
        """SHA-256 (hex) of all that its metrics depend on except the model: configurations, items, lm-eval's version.

        A function in a configuration counts with the whole text of its file, since it may call other functions there.
        The path of the file does not count.
        """
        tasks = {name: _describe(task) for name, task in sorted(self.tasks.items())}
        groups = {name: _plain(group.to_dict()) for name, group in sorted(self.groups.items())}
        return digest_of({"lm_eval": version("lm-eval"), "tasks": tasks, "groups": groups})


class TaskLibrary:
    """All tasks that settings can name: SAMQ's, those in the user's folders, and lm-eval's own."""

    def __init__(self, folders: Sequence[Path] = ()) -> None:
        """Raises SamqError if a folder is missing, or a .yaml file in it is malformed."""
        for folder in folders:
            if not folder.is_dir():
                raise SamqError(f"the folder of tasks {folder} does not exist; check task_folders")
            for path in sorted(folder.glob("**/*.yaml")):
                _read(path)
        self._folders = [FOLDER, *folders]
        self._near = TaskManager(include_defaults=False, include_path=self._folders)

    def open(self, name: str, settings: BenchmarkSettings) -> Benchmark:
        """Open a task, a group, a tag or a task file, with its data.

        Raises SamqError if the name is unknown, the file is malformed, or the data cannot be loaded. Also if the task runs code
        and the settings do not allow that.
        """
        is_file = name.endswith((".yaml", ".yml"))
        with quiet_lm_eval(), code_allowed(settings.run_code):
            try:
                manager, config = self._manager(name, is_file)
                # before loading it: some of lm-eval's own code tasks run code when they are imported
                if not settings.run_code and _says_unsafe(manager, config):
                    raise _code_refused(name)
                loaded = manager.load([name])
            except SamqError:
                raise
            except Exception as error:  # a task is its author's program, and can raise anything
                raise _explained(name, error) from error
        benchmark = Benchmark(Path(name).stem if is_file else name, loaded["tasks"], loaded.get("groups", {}))
        if benchmark.runs_code and not settings.run_code:
            raise _code_refused(name)
        return benchmark

    def _manager(self, name: str, is_file: bool) -> tuple[TaskManager, dict[str, Any]]:
        """The task manager that can open the task, and the task's configuration.

        Searches lm-eval's own tasks only if necessary: they are 14,000 files, which takes six seconds.
        """
        if is_file:
            config = _read(Path(name))
            if not isinstance(config.get("group", config.get("task")), str):
                raise SamqError(f"{name} does not name its task; add a line `task: NAME`")
        else:
            entry = self._near.task_index.get(name)
            config = (entry.cfg if entry else None) or {"group": name, "task": [name]}  # a tag, or an unknown name
        if "group" not in config or self.are_near(config.get("task") or []):
            return self._near, config
        manager = _lm_evals() if self._folders == [FOLDER] else TaskManager(include_path=self._folders)
        if not is_file and name not in manager.task_index:
            raise SamqError(f"the task {name!r} does not exist; {_nearest(name, manager.all_tasks)}")
        return manager, config if is_file else _config(manager, name)

    def are_near(self, members: Sequence[Any]) -> bool:
        """Whether all these tasks, or members of a group, are SAMQ's or the user's: then nobody need search lm-eval's own."""
        for member in members:
            name = member.get("group", member.get("task")) if isinstance(member, Mapping) else member
            entry = self._near.task_index.get(name)
            if (
                entry is None
                or entry.cfg is None
                or ("group" in entry.cfg and not self.are_near(entry.cfg.get("task") or []))
            ):
                return False
        return True


@lru_cache
def _lm_evals() -> TaskManager:
    """SAMQ's tasks and lm-eval's own."""
    return TaskManager(include_path=FOLDER)


def check_benchmarks(
    settings: BenchmarkSettings, progress: Progress = silent, retry_delays_s: Sequence[float] = ()
) -> tuple[dict[str, str], dict[str, str]]:
    """The digest of each task that can run now, and for each other task the reason why it cannot.

    A flow calls this before a long run. A task whose data a dropped connection has cut off is opened again after each of
    the delays. Raises SamqError for errors that the user has to correct: an unknown task, a malformed file, a missing
    folder.
    """
    library = TaskLibrary(settings.task_folders)
    digests, missing = {}, {}
    for count, name in enumerate(settings.tasks):
        progress(count, len(settings.tasks))
        for delay_s in (*retry_delays_s, None):
            with seeded(settings.seed), quiet_lm_eval():
                try:
                    digests[name] = library.open(name, settings).digest()
                    break
                except UnavailableError as error:
                    missing[name] = str(error)
                    if delay_s is None or not is_unreachable(error):
                        break
            logger.warning("%s; trying again in %g s", missing[name], delay_s)
            time.sleep(delay_s)
    return digests, {name: reason for name, reason in missing.items() if name not in digests}


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed Python's and NumPy's global generators as lm-eval does, for tasks that shuffle; restore them afterwards."""
    states = random.getstate(), np.random.get_state()
    random.seed(DEFAULT_RANDOM_SEED if seed is None else seed)
    np.random.seed(DEFAULT_OTHER_SEED if seed is None else seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silence lm-eval's warnings about a task, which are for its author, and the bars of `datasets`; keep errors."""
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
    """Tell Hugging Face's `code_eval`, which lm-eval's own code tasks use, whether the user allows code."""
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
    """Read a task file without resolving its functions."""
    if not path.is_file():
        raise SamqError(f"the task file {path} does not exist; check the path")
    try:
        task: dict[str, Any] = load_yaml(path, resolve_func=False)
    except Exception as error:  # PyYAML's, or lm-eval's about a file that it includes
        raise SamqError(f"{path} is not a valid task file ({one_line(str(error))}); correct it") from error
    return task


def _config(manager: TaskManager, name: str) -> dict[str, Any]:
    """The configuration of a task or a group, with unresolved functions; a tag counts as a group of its tasks."""
    entry = manager.task_index.get(name)
    if entry is None:
        return {}
    return entry.cfg or {"group": name, "task": sorted(entry.tags)}


def _says_unsafe(manager: TaskManager, config: Mapping[str, Any]) -> bool:
    """Whether a configuration, or that of a member of the group, says that the task runs the model's code."""
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
    return SamqError(f"{name} runs code that the model writes; allow it with run_code, or leave the task out")


def _runs_code(task: Task) -> bool:
    return bool(getattr(task, "UNSAFE_CODE", False))


def _explained(name: str, error: Exception) -> SamqError:
    """The error of opening a task, with advice for the user."""
    reason = f"{type(error).__name__}: {one_line(str(error))}"
    cause = error.__cause__ or error
    if isinstance(cause, ImportError) and cause.name:
        return UnavailableError(f"{name} needs the Python package {cause.name}; install it")
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _HUB:
        return UnavailableError(
            f"cannot load the data of {name} ({reason}); connect to the network, check its file, or choose one of SAMQ's "
            f"own tasks (samq_...)"
        )
    return SamqError(f"lm-eval cannot open the task {name} ({reason}); correct its file")


def _nearest(name: str, known: Sequence[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"similar names are {', '.join(matches)}" if matches else "`samq lm-eval ls tasks` lists lm-eval's tasks"


def _describe(task: Task) -> dict[str, Any]:
    """A task's configuration and the digests of all its documents, wherever they came from."""
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
    """A value in JSON's types: functions by their name and file, any other value that JSON lacks as text."""
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
