from pathlib import Path

import pytest
from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows.gather import Gather
from samq.errors import SamqError
from samq.records import Toolchain
from samq.sweep.selection import Failure
from samq.workspace import Workspace
from tasks.stage import stage, step


@stage("count", version=1, run_name="count {number}")
def count(at: Workspace, folder: Path, number: int) -> None:
    """A file with the number; fails below zero."""
    if number < 0:
        raise SamqError(f"{number} is below zero; give another")
    (folder / "number.txt").write_text(str(number))


@pytest.fixture
def at(tmp_path):
    return Workspace(tmp_path / "store", Toolchain(version="1", build="none", bin_folder=Path("/nowhere")))


def numbers(artifacts):
    return {name: artifact.path("number.txt").read_text() for name, artifact in artifacts.items()}


def check_gathering(at, gather):
    """What must hold outside and inside of a flow run alike."""
    futures = {name: count.submit(at, number) for name, number in (("one", 1), ("bad", -1), ("two", 2))}
    assert numbers(gather("quantize", futures)) == {"one": "1", "two": "2"}
    assert gather.failures == [Failure("bad", "quantize", "-1 is below zero; give another")]


def test_what_ended_well_is_given_by_name_and_what_failed_is_a_failure_of_its_stage(at):
    check_gathering(at, Gather())


def test_inside_of_a_flow_run_too(at, prefect_home):
    gather = Gather()

    @flow(task_runner=ThreadPoolTaskRunner(max_workers=2))
    def one():
        check_gathering(at, gather)

    one()
    assert len(gather.failures) == 1


def test_failures_add_up_in_their_order_and_others_are_counted_too(at):
    gather = Gather()
    gather("plan", {"a": count.submit(at, -1)})
    gather.lose("b", "compensate", "Q4_K: the Gram matrix cannot be inverted")
    assert gather("evaluate", {}) == {}
    assert [(failure.name, failure.stage) for failure in gather.failures] == [("a", "plan"), ("b", "compensate")]
    assert gather.failures[1].reason == "Q4_K: the Gram matrix cannot be inverted"


def test_errors_can_be_kept_by_any_key_and_are_no_failures_then(at):
    gather = Gather()
    outcomes = gather.keeping_errors(
        {("Q4_K_M", "mmlu"): count.submit(at, 1), ("Q4_K_M", "gsm8k"): count.submit(at, -1)}
    )
    assert outcomes["Q4_K_M", "mmlu"] == count(at, 1)
    assert isinstance(outcomes["Q4_K_M", "gsm8k"], SamqError)
    assert gather.failures == []


def test_what_is_neither_an_artifact_nor_an_error_is_an_error():
    @step("say")
    def say() -> str:
        return "no artifact"

    (outcome,) = Gather.keeping_errors({"it": say.submit()}).values()
    assert isinstance(outcome, RuntimeError) and str(outcome) == "no artifact"
