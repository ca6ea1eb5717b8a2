"""What `samq up` leaves behind when it ends."""

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL
from prefect.states import Running

from samq.services import _is_at_work, _report_ended


@flow
def work():
    """A run of it is all that is needed."""


@pytest.mark.usefixtures("prefect_home")
def test_runs_of_ended_processes_are_not_said_to_be_running():
    with get_client(sync_client=True) as client:
        ended, other = (client.create_flow_run(work, state=Running()) for _ in range(2))
        client.update_flow_run(ended.id, infrastructure_pid="4711")
        client.update_flow_run(other.id, infrastructure_pid="4712")
        _report_ended(PREFECT_API_URL.value(), lambda run: run["infrastructure_pid"] == "4711")
        assert client.read_flow_run(ended.id).state.is_crashed()
        assert client.read_flow_run(other.id).state.is_running()


def test_a_server_that_has_ended_is_no_error():
    _report_ended("http://127.0.0.1:9/api", lambda _: True)


@pytest.mark.parametrize(
    "pool, process, is_at_work",
    [
        (None, None, True),  # `samq requantize`: no worker knows its process
        ("samq", None, False),
        ("samq", "4194305", False),  # more than a process's id can be
        ("samq", "1", False),  # an id that another program has now
    ],
)
def test_a_run_is_at_work_while_its_process_is(pool, process, is_at_work):
    assert _is_at_work({"work_pool_name": pool, "infrastructure_pid": process}) is is_at_work
