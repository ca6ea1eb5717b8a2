"""Turns on the GPU among the runs of one Prefect server."""

import os
import threading
import time
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from samq.errors import SamqError
from samq.services import GPU_LIMIT, _limit_gpu
from samq.workspace import Workspace
from tasks.gpu import in_turn, torch_has_gpu, turn
from tasks.stage import stage

pytestmark = pytest.mark.usefixtures("prefect_home")


@pytest.fixture
def limit(tmp_path):
    _limit_gpu(tmp_path, {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()})
    yield
    with get_client(sync_client=True) as client:
        client.delete_global_concurrency_limit_by_name(GPU_LIMIT)


def test_without_the_limit_a_stage_on_the_gpu_is_refused_before_its_work(tmp_path, at):
    made = []

    @stage("measure", version=1, run_name="measure", retries=0)
    @in_turn(lambda _: True)
    def measure(at: Workspace, folder: Path) -> None:
        made.append(folder)

    @flow
    def run():
        measure(at)

    with pytest.raises(SamqError, match=r"no concurrency limit gpu, .*; run `prefect gcl create gpu --limit 1`"):
        run()
    assert made == []


def test_two_runs_do_not_use_the_gpu_at_the_same_time(limit):
    inside, most = [], []

    def work():
        with turn():
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.3)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


def test_a_limit_that_is_there_stays_as_it_was_set(limit, tmp_path):
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(GPU_LIMIT, 3)
        _limit_gpu(tmp_path, {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()})
        assert client.read_global_concurrency_limit_by_name(GPU_LIMIT).limit == 3


def test_without_a_server_there_is_nobody_to_wait_for():
    with temporary_settings({PREFECT_API_URL: None}), turn():
        pass


def test_only_a_gpu_has_turns(at):
    assert not torch_has_gpu(at) and torch_has_gpu(Workspace(at.store, at.toolchain, device="cuda:0"))
