"""Caching, retries and failures of stages, with real Prefect and a store of their own."""

import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Failed
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import BaseModel

from flows.gather import Gather
from samq import __version__
from samq.data.datasets import DatasetSpec
from samq.errors import SamqError, ToolError, UnreachableError
from samq.evaluation.settings import BenchmarkSettings
from samq.llamacpp.process import run as run_program
from samq.records import ModelSource, TextSet
from samq.sensitivity.checkpoint import describe_source
from samq.store import MANIFEST, Artifact, Store
from samq.workspace import Workspace
from tasks.stage import ContentCache, identity, is_transient, stage, step
from tasks.text import load_text
from tests.conftest import write_tiny_gguf

pytestmark = pytest.mark.usefixtures("prefect_home")


def make_stage(version=1, datasets=None):
    @stage("greet", version=version, run_name="greet {text.dataset}")
    def greet(at: Workspace, folder: Path, text: TextSet, loud: bool = False) -> None:
        if datasets is not None:
            datasets.append(text.dataset)
        (folder / "greeting.txt").write_text(" ".join(text.texts) + ("!" if loud else ""))

    return greet


def texts(*words):
    return TextSet(dataset="words", texts=words)


def run(task, *args, **kwargs):
    """The task's final state, in a flow run of its own."""
    states = []

    @flow
    def one():
        states.append(task(*args, **kwargs, return_state=True))

    one()
    return states[0]


def test_the_second_run_is_cached_and_gives_the_same_artifact(at):
    greet = make_stage()
    first, second = (run(greet, at, texts("hello")) for _ in range(2))
    assert (first.name, second.name) == ("Completed", "Cached")
    assert first.result() == second.result()
    assert first.result().path("greeting.txt").read_text() == "hello"


def test_other_content_misses(at):
    greet = make_stage()
    run(greet, at, texts("hello"))
    assert run(greet, at, texts("bye")).name == "Completed"
    assert run(greet, at, texts("hello"), loud=True).name == "Completed"
    assert run(greet, at, texts("hello")).name == "Cached"


def test_the_same_path_with_other_content_misses(at, tmp_path):
    @stage("measure", version=1, run_name="measure")
    def measure(at: Workspace, folder: Path, model: ModelSource, text: TextSet) -> None:
        (folder / "size.txt").write_text(f"{model.gguf.stat().st_size} {text.texts}")

    gguf, rows = tmp_path / "model.gguf", tmp_path / "rows.txt"

    def again():
        text = load_text(DatasetSpec(name=str(rows)))
        return run(measure, at, describe_source(gguf), text).name

    write_tiny_gguf(gguf)
    rows.write_text("one")
    assert [again(), again()] == ["Completed", "Cached"]
    times = gguf.stat()
    write_tiny_gguf(gguf, seed=1)
    os.utime(gguf, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert [again(), again()] == ["Completed", "Cached"]
    rows.write_text("two")
    assert [again(), again()] == ["Completed", "Cached"]


def test_a_new_version_of_the_stage_invalidates(at):
    run(make_stage(version=1), at, texts("hello"))
    assert run(make_stage(version=2), at, texts("hello")).name == "Completed"


@pytest.mark.parametrize("damage", ["file deleted", "file altered", "manifest deleted"])
def test_a_damaged_artifact_is_made_again_once(at, damage):
    greet = make_stage()
    artifact = run(greet, at, texts("hello")).result()
    match damage:
        case "file deleted":
            artifact.path("greeting.txt").unlink()
        case "file altered":
            artifact.path("greeting.txt").write_text("jello")
        case "manifest deleted":
            (artifact.folder / MANIFEST).unlink()
    states = [run(greet, at, texts("hello")) for _ in range(2)]
    assert [state.name for state in states] == ["Completed", "Cached"]
    assert states[0].result().digest() == artifact.digest()
    assert states[0].result().path("greeting.txt").read_text() == "hello"


def test_what_the_store_has_is_not_made_again_when_prefect_forgot(at):
    datasets = []
    greet = make_stage(datasets=datasets)
    greet(at, texts("hello"))
    assert run(greet, at, texts("hello")).name == "Completed"
    assert datasets == ["words"]


def test_a_moved_store_is_found_where_it_is_now(at, tmp_path):
    greet = make_stage()
    run(greet, at, texts("hello"))
    at.store.rename(tmp_path / "moved")
    artifact = run(greet, replace(at, store=tmp_path / "moved"), texts("hello")).result()
    assert artifact.path("greeting.txt").parent.is_relative_to(tmp_path / "moved")
    assert artifact.path("greeting.txt").read_text() == "hello"


def test_a_failing_stage_publishes_nothing_and_an_error_of_the_users_is_not_retried(at):
    attempts = []

    @stage("fail", version=1, run_name="fail")
    def fail(at: Workspace, folder: Path, number: int) -> None:
        attempts.append(number)
        (folder / "half.txt").write_text("half")
        raise SamqError("the model is missing; give another")

    state = run(fail, at, 1)
    assert state.is_failed()
    assert attempts == [1]
    assert list(Store(at.store).artifacts()) == []


def test_a_transient_fault_is_tried_again_and_said(at, monkeypatch, caplog):
    monkeypatch.setattr("tasks.stage.RETRY_DELAYS_S", [0.0, 0.0])
    attempts = []

    @stage("fetch", version=1, run_name="fetch")
    def fetch(at: Workspace, folder: Path, number: int) -> None:
        attempts.append(number)
        if len(attempts) == 1:
            raise ConnectionError("reset by peer")
        (folder / "whole.txt").write_text("whole")

    state = run(fetch, at, 1)
    assert state.name == "Completed"
    assert attempts == [1, 1]
    assert "failed for now, tried again within a minute: reset by peer" in caplog.text
    assert state.result().path("whole.txt").read_text() == "whole"


def test_an_artifact_says_what_made_it_and_is_the_same_whatever_made_it(at, toolchain):
    def artifact_of(version):
        @stage("count", version=version, run_name="count", keyed_by=("toolchain",), packages=("numpy",))
        def count(at: Workspace, folder: Path) -> None:
            (folder / "number.txt").write_text("1")

        return count(replace(at, toolchain=toolchain))

    one, other = artifact_of(1), artifact_of(2)
    assert one.made_by == {
        "samq": __version__,
        "stage version": "1",
        "numpy": np.__version__,
        "llama.cpp": f"{toolchain.version} {toolchain.build}",
    }
    assert one.made_by != other.made_by and one.digest() == other.digest()


def test_an_artifact_made_from_others_says_which_llama_cpp_made_those(at, toolchain):
    @stage("rung", version=1, run_name="rung", keyed_by=("toolchain",))
    def rung(at: Workspace, folder: Path, number: int) -> None:
        (folder / "number.txt").write_text(str(number))

    @stage("assemble", version=1, run_name="assemble")
    def assemble(at: Workspace, folder: Path, rungs: dict[str, Artifact]) -> None:
        (folder / "numbers.txt").write_text(str(len(rungs)))

    other = toolchain.model_copy(update={"build": "0"})
    rungs = {str(number): rung(replace(at, toolchain=tools), number) for number, tools in enumerate((toolchain, other))}
    build = f"{toolchain.version} {toolchain.build}"
    assert assemble(at, {"0": rungs["0"]}).made_by["llama.cpp"] == build
    assert assemble(at, rungs).made_by["llama.cpp"] == f"{toolchain.version} 0, {build}"


def test_without_a_key_a_stage_fails_and_does_not_run_uncached(at, tmp_path):
    models = []

    @stage("guess", version=1, run_name="guess")
    def guess(at: Workspace, folder: Path, model: Path) -> None:
        models.append(model)

    state = run(guess, at, tmp_path / "model")  # Prefect itself logs what its key function raises
    assert state.is_failed() and models == []
    with pytest.raises(TypeError, match="PosixPath has no content to key a cache by"):
        state.result()


def test_a_submitted_stage_whose_child_hangs_fails_at_its_limit_and_its_log_stays(at):
    @stage("hang", version=1, run_name="hang")
    def hang(at: Workspace, folder: Path) -> None:
        run_program(["sh", "-c", "echo waiting; sleep 600"], log=folder / "hang.log", timeout_s=at.timeout_s)

    @flow(task_runner=ThreadPoolTaskRunner(max_workers=2))
    def one():
        future = hang.submit(replace(at, timeout_s=1.0))
        future.wait()
        return future.result(raise_on_failure=False)

    error = one()
    assert isinstance(error, ToolError)
    said = re.fullmatch(r"sh was stopped after 1 s; raise its limit \(log: (.*)\)", str(error))
    assert Path(said[1]).read_text() == "waiting\n"
    assert list(Store(at.store).artifacts()) == []


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ConnectionError("reset"), True),
        (TimeoutError(), True),
        (UnreachableError("the hub did not answer"), True),
        (SamqError("no"), False),
        (ValueError("bug"), False),
    ],
)
def test_only_transient_faults_are_retried(error, transient):
    assert is_transient(None, None, Failed(data=error)) is transient


def test_identity_is_content_and_refuses_what_has_none(tmp_path):
    class Settings(BaseModel):
        size: int

    assert identity(Settings(size=1)) == {"size": 1}
    assert identity([texts("a"), None]) == [texts("a").digest(), None]
    with pytest.raises(TypeError, match="PosixPath has no content to key a cache by"):
        identity(tmp_path)


def test_keys_of_different_stages_differ_and_a_place_or_a_time_changes_none(at, tmp_path):
    inputs = {"text": texts("hello")}
    one, other = ContentCache(stage="one"), ContentCache(stage="other")
    assert one.artifact_key(at, inputs) != other.artifact_key(at, inputs)
    elsewhere = replace(at, store=tmp_path / "elsewhere", timeout_s=6.0)
    assert one.artifact_key(at, inputs) == one.artifact_key(elsewhere, inputs)


def test_what_a_stage_names_of_the_workspace_is_in_its_key_and_nothing_else_of_it(at):
    other = replace(at, toolchain=at.toolchain.model_copy(update={"build": "other"}))
    plain, keyed = ContentCache(stage="one"), ContentCache(stage="one", keyed_by=("toolchain",))
    assert plain.artifact_key(at, {}) == plain.artifact_key(other, {})
    assert keyed.artifact_key(at, {}) != keyed.artifact_key(other, {})


def test_a_dataclass_of_inputs_stands_for_its_fields(at):
    @dataclass(frozen=True)
    class Letter:
        text: TextSet
        copies: int

    cache, text = ContentCache(stage="one"), texts("hello")
    assert cache.artifact_key(at, {"letter": Letter(text, 2)}) == cache.artifact_key(at, {"text": text, "copies": 2})
    with pytest.raises(TypeError, match="two inputs of a stage are called copies; rename one"):
        cache.artifact_key(at, {"letter": Letter(text, 2), "copies": 3})


@pytest.fixture
def no_server(tmp_path):
    """Prefect with a home of its own, and a server's address at which nothing listens; gives that home."""
    home = tmp_path / "prefect"
    with temporary_settings({PREFECT_HOME: home, PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        yield home


def test_outside_of_a_flow_run_a_stage_is_a_function_with_the_same_store_and_needs_no_server(at, no_server):
    datasets = []
    greet = make_stage(datasets=datasets)
    artifact = greet(at, texts("hello"))
    assert artifact.path("greeting.txt").read_text() == "hello"
    assert greet(at, texts("hello")) == greet.submit(at, texts("hello")).result() == artifact
    assert datasets == ["words"], "the store had it"
    assert not no_server.exists()


def test_outside_of_a_flow_run_the_error_of_a_submitted_stage_is_kept(at, no_server):
    @stage("fail", version=1, run_name="fail")
    def fail(at: Workspace, folder: Path, number: int) -> None:
        raise SamqError(f"{number} is missing; give another")

    greet = make_stage()
    outcomes = Gather.keeping_errors({"good": greet.submit(at, texts("hello")), "bad": fail.submit(at, 1)})
    assert outcomes["good"] == greet(at, texts("hello"))
    assert isinstance(outcomes["bad"], SamqError) and str(outcomes["bad"]) == "1 is missing; give another"
    with pytest.raises(SamqError, match="1 is missing"):
        fail(at, 1)
    assert not no_server.exists()


def test_a_step_is_a_function_outside_of_a_flow_run(no_server):
    @step("double", run_name="double {number}")
    def double(number: int) -> int:
        return 2 * number

    assert double(1) == double.submit(1).result() == 2
    assert not no_server.exists()


def test_inside_of_a_flow_a_stage_is_a_task_run_with_a_name(at):
    greet = make_stage()

    @flow
    def one():
        called = greet(at, texts("hello"), return_state=True)
        submitted = greet.submit(at, texts("bye"))
        return [called.state_details.task_run_id, submitted.task_run_id], [called.result(), submitted.result()]

    ids, artifacts = one()
    assert artifacts == [greet(at, texts("hello")), greet(at, texts("bye"))]
    recorded = [("greet words", "Completed")] * 2
    with get_client(sync_client=True) as prefect:
        for _ in range(600):  # Prefect records task runs by events, which may come after the flow's end
            with suppress(ObjectNotFound):
                if [(run.name, run.state_name) for run in map(prefect.read_task_run, ids)] == recorded:
                    return
            time.sleep(0.1)
    raise AssertionError("Prefect has not recorded the task runs")


def test_a_benchmarks_identity_is_what_shapes_its_prompts():
    plain = identity(BenchmarkSettings())
    assert plain == identity(BenchmarkSettings(tasks=("mmlu",), task_folders=(Path("/elsewhere"),), run_code=True))
    for changed in ({"few_shots": 1}, {"limit": 5}, {"chat_template": True}, {"seed": 1}, {"context_tokens": 512}):
        assert identity(BenchmarkSettings(**changed)) != plain
