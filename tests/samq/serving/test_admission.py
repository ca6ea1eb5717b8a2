"""Slots: how many a request takes, and who gets them first."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest

from samq.serving.admission import Admission, slots_of
from samq.serving.metrics import Metrics

LONG = {"prompt": "hello", "max_tokens": 2000, "temperature": 0, "stream": True}


@pytest.mark.parametrize(
    ("path", "fields", "slots"),
    [
        ("/v1/chat/completions", {"messages": [{}, {}]}, 1),
        ("/v1/chat/completions", {"n": 3}, 3),
        ("/v1/completions", {"prompt": "text"}, 1),
        ("/v1/completions", {"prompt": [1, 2, 3]}, 1),
        ("/v1/completions", {"prompt": ["text", 2, 3]}, 1),
        ("/v1/completions", {"prompt": ["one", "two"]}, 2),
        ("/v1/completions", {"prompt": [[1, 2], [3]], "n": 2}, 4),
        ("/v1/completions", {"prompt": ["one"] * 100}, 8),
        ("/infill", {"n_cmpl": 2}, 2),
        ("/v1/embeddings", {"input": ["one", "two", "three"]}, 3),
        ("/v1/rerank", {"query": "q", "documents": ["one", "two"]}, 2),
        ("/v1/completions", {"prompt": [], "n": -5}, 1),
        ("/v1/completions", {"n": "many"}, 1),
    ],
)
def test_a_request_takes_a_slot_for_each_of_its_answers(path, fields, slots):
    assert slots_of(path, fields, 8) == slots


def test_several_answers_take_as_many_slots(served):
    with (
        ThreadPoolExecutor(1) as pool,
        httpx.stream("POST", f"{served.url}/v1/completions", json=LONG | {"n": 3}) as one,
    ):
        pieces = one.iter_bytes()
        next(pieces)
        assert served.child.leases == 3
        two = pool.submit(served.complete, prompt=["a", "b"])
        served.wait(lambda: served.metric("samq_requests_waiting") == 1)
        assert served.metric("samq_requests_running") == 1
        one.close()
        assert len(two.result().json()["choices"]) == 2
    served.wait(lambda: served.child.leases == 0)


def test_a_request_that_needs_many_slots_is_not_passed_by_others_and_lets_them_go_on_when_it_leaves():
    async def play():
        child = SimpleNamespace(alive=True, leases=0)
        admission = Admission(4, 10, Metrics())
        admission.serve(SimpleNamespace(child=child))
        assert await admission.enter(3) is child
        many, one = asyncio.create_task(admission.enter(4)), asyncio.create_task(admission.enter(1))
        await asyncio.sleep(0)
        assert not many.done() and not one.done() and child.leases == 3
        many.cancel()
        await asyncio.gather(many, return_exceptions=True)
        assert await one is child and child.leases == 4
        admission.leave(child, 3, 0.1)
        admission.leave(child, 1, 0.1)
        assert child.leases == 0 and admission.idle

    asyncio.run(play())
