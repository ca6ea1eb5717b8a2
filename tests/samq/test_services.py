"""What `samq up` leaves behind when it ends."""

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL
from prefect.states import Running

from samq.services import _report_ended


@flow
def work():
    """A run of it is all that is needed."""


@pytest.mark.usefixtures("prefect_home")
def test_runs_of_ended_processes_are_not_said_to_be_running():
    with get_client(sync_client=True) as client:
        ended, other = (client.create_flow_run(work, state=Running()) for _ in range(2))
        client.update_flow_run(ended.id, infrastructure_pid="4711")
        client.update_flow_run(other.id, infrastructure_pid="4712")
        _report_ended(PREFECT_API_URL.value(), {4711, 99})
        assert client.read_flow_run(ended.id).state.is_crashed()
        assert client.read_flow_run(other.id).state.is_running()


def test_a_server_that_has_ended_is_no_error():
    _report_ended("http://127.0.0.1:9/api", {4711})
