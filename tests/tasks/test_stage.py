"""Caching, retries and failures of stages, with real Prefect and a store of their own."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from prefect import flow
from prefect.states import Failed
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import BaseModel

from samq import __version__
from samq.data.datasets import DatasetSpec
from samq.errors import SamqError, ToolError, UnreachableError
from samq.evaluation.settings import BenchmarkSettings
from samq.llamacpp.process import run as run_program
from samq.records import ModelSource, TextSet, Toolchain
from samq.sensitivity.hf_model import describe_source
from samq.store import MANIFEST, Artifact, Store
from tasks.stage import ContentCache, identity, is_transient, stage
from tasks.text import load_text
from tests.conftest import write_tiny_gguf

pytestmark = pytest.mark.usefixtures("prefect_home")


def make_stage(version=1, made=None):
    @stage("greet", version=version, run_name="greet {text.dataset}")
    def greet(folder: Path, text: TextSet, loud: bool = False) -> None:
        if made is not None:
            made.append(text.dataset)
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


def test_the_second_run_is_cached_and_gives_the_same_artifact(tmp_path):
    greet = make_stage()
    first, second = (run(greet, tmp_path / "store", texts("hello")) for _ in range(2))
    assert (first.name, second.name) == ("Completed", "Cached")
    assert first.result() == second.result()
    assert first.result().path("greeting.txt").read_text() == "hello"


def test_other_content_misses(tmp_path):
    greet = make_stage()
    run(greet, tmp_path / "store", texts("hello"))
    assert run(greet, tmp_path / "store", texts("bye")).name == "Completed"
    assert run(greet, tmp_path / "store", texts("hello"), loud=True).name == "Completed"
    assert run(greet, tmp_path / "store", texts("hello")).name == "Cached"


def test_the_same_path_with_other_content_misses(tmp_path):
    @stage("measure", version=1, run_name="measure")
    def measure(folder: Path, model: ModelSource, text: TextSet) -> None:
        (folder / "size.txt").write_text(f"{model.gguf.stat().st_size} {text.texts}")

    gguf, rows = tmp_path / "model.gguf", tmp_path / "rows.txt"

    def again():
        text = load_text.fn(DatasetSpec(name=str(rows)))
        return run(measure, tmp_path / "store", describe_source(gguf), text).name

    write_tiny_gguf(gguf)
    rows.write_text("one")
    assert [again(), again()] == ["Completed", "Cached"]
    times = gguf.stat()
    write_tiny_gguf(gguf, seed=1)
    os.utime(gguf, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert [again(), again()] == ["Completed", "Cached"]
    rows.write_text("two")
    assert [again(), again()] == ["Completed", "Cached"]


def test_a_new_version_of_the_stage_invalidates(tmp_path):
    run(make_stage(version=1), tmp_path / "store", texts("hello"))
    assert run(make_stage(version=2), tmp_path / "store", texts("hello")).name == "Completed"


@pytest.mark.parametrize("damage", ["file deleted", "file altered", "manifest deleted"])
def test_a_damaged_artifact_is_made_again_once(tmp_path, damage):
    greet = make_stage()
    artifact = run(greet, tmp_path / "store", texts("hello")).result()
    match damage:
        case "file deleted":
            artifact.path("greeting.txt").unlink()
        case "file altered":
            artifact.path("greeting.txt").write_text("jello")
        case "manifest deleted":
            (artifact.folder / MANIFEST).unlink()
    states = [run(greet, tmp_path / "store", texts("hello")) for _ in range(2)]
    assert [state.name for state in states] == ["Completed", "Cached"]
    assert states[0].result().digest() == artifact.digest()
    assert states[0].result().path("greeting.txt").read_text() == "hello"


def test_what_the_store_has_is_not_made_again_when_prefect_forgot(tmp_path):
    made = []
    greet = make_stage(made=made)
    greet.fn(tmp_path / "store", texts("hello"))
    assert run(greet, tmp_path / "store", texts("hello")).name == "Completed"
    assert made == ["words"]


def test_a_moved_store_is_found_where_it_is_now(tmp_path):
    greet = make_stage()
    run(greet, tmp_path / "store", texts("hello"))
    (tmp_path / "store").rename(tmp_path / "moved")
    artifact = run(greet, tmp_path / "moved", texts("hello")).result()
    assert artifact.path("greeting.txt").parent.is_relative_to(tmp_path / "moved")
    assert artifact.path("greeting.txt").read_text() == "hello"


def test_a_failing_stage_publishes_nothing_and_an_error_of_the_users_is_not_retried(tmp_path):
    attempts = []

    @stage("fail", version=1, run_name="fail")
    def fail(folder: Path, number: int) -> None:
        attempts.append(number)
        (folder / "half.txt").write_text("half")
        raise SamqError("the model is missing; give another")

    state = run(fail, tmp_path / "store", 1)
    assert state.is_failed()
    assert attempts == [1]
    assert list(Store(tmp_path / "store").artifacts()) == []


def test_a_transient_fault_is_tried_again_and_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("tasks.stage.RETRY_DELAYS_S", [0.0, 0.0])
    attempts = []

    @stage("fetch", version=1, run_name="fetch")
    def fetch(folder: Path, number: int) -> None:
        attempts.append(number)
        if len(attempts) == 1:
            raise ConnectionError("reset by peer")
        (folder / "whole.txt").write_text("whole")

    state = run(fetch, tmp_path / "store", 1)
    assert state.name == "Completed"
    assert attempts == [1, 1]
    assert "failed for now, tried again within a minute: reset by peer" in caplog.text
    assert state.result().path("whole.txt").read_text() == "whole"


def test_an_artifact_says_what_made_it_and_is_the_same_whatever_made_it(tmp_path, toolchain):
    def made(version):
        @stage("count", version=version, run_name="count", packages=("numpy",))
        def count(folder: Path, toolchain: Toolchain) -> None:
            (folder / "number.txt").write_text("1")

        return count.fn(tmp_path / "store", toolchain)

    one, other = made(1), made(2)
    assert one.made_by == {
        "samq": __version__,
        "stage version": "1",
        "numpy": np.__version__,
        "llama.cpp": f"{toolchain.version} {toolchain.build}",
    }
    assert one.made_by != other.made_by and one.digest() == other.digest()


def test_an_artifact_made_from_others_says_which_llama_cpp_made_those(tmp_path, toolchain):
    @stage("rung", version=1, run_name="rung")
    def rung(folder: Path, number: int, toolchain: Toolchain) -> None:
        (folder / "number.txt").write_text(str(number))

    @stage("assemble", version=1, run_name="assemble")
    def assemble(folder: Path, rungs: dict[str, Artifact]) -> None:
        (folder / "numbers.txt").write_text(str(len(rungs)))

    store = tmp_path / "store"
    other = toolchain.model_copy(update={"build": "0"})
    rungs = {str(number): rung.fn(store, number, tools) for number, tools in enumerate((toolchain, other))}
    build = f"{toolchain.version} {toolchain.build}"
    assert assemble.fn(store, {"0": rungs["0"]}).made_by["llama.cpp"] == build
    assert assemble.fn(store, rungs).made_by["llama.cpp"] == f"{toolchain.version} 0, {build}"


def test_without_a_key_a_stage_fails_and_does_not_run_uncached(tmp_path):
    made = []

    @stage("guess", version=1, run_name="guess")
    def guess(folder: Path, model: Path) -> None:
        made.append(model)

    state = run(guess, tmp_path / "store", tmp_path / "model")  # Prefect itself logs what its key function raises
    assert state.is_failed() and made == []
    with pytest.raises(TypeError, match="PosixPath has no content to key a cache by"):
        state.result()


def test_a_submitted_stage_whose_child_hangs_fails_at_its_limit_and_its_log_stays(tmp_path):
    @stage("hang", version=1, run_name="hang")
    def hang(folder: Path, timeout_s: float) -> None:
        run_program(["sh", "-c", "echo waiting; sleep 600"], log=folder / "hang.log", timeout_s=timeout_s)

    @flow(task_runner=ThreadPoolTaskRunner(max_workers=2))
    def one():
        future = hang.submit(tmp_path / "store", 1.0)
        future.wait()
        return future.result(raise_on_failure=False)

    error = one()
    assert isinstance(error, ToolError)
    said = re.fullmatch(r"sh was stopped after 1 s; raise its limit \(log: (.*)\)", str(error))
    assert Path(said[1]).read_text() == "waiting\n"
    assert list(Store(tmp_path / "store").artifacts()) == []


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


def test_keys_of_different_stages_differ():
    inputs = {"text": texts("hello"), "store": "/anywhere", "timeout_s": 5}
    one, other = ContentCache(stage="one"), ContentCache(stage="other")
    assert one.artifact_key(inputs) != other.artifact_key(inputs)
    assert one.artifact_key(inputs) == one.artifact_key({**inputs, "store": "/elsewhere", "timeout_s": 6})


def test_a_benchmarks_identity_is_what_shapes_its_prompts():
    plain = identity(BenchmarkSettings())
    assert plain == identity(BenchmarkSettings(tasks=("mmlu",), task_folders=(Path("/elsewhere"),), run_code=True))
    for changed in ({"few_shots": 1}, {"limit": 5}, {"chat_template": True}, {"seed": 1}, {"context_tokens": 512}):
        assert identity(BenchmarkSettings(**changed)) != plain
