import threading

import pytest
import torch

from samq.errors import SamqError
from samq.sensitivity.hidden_states import HiddenStates, Writer
from samq.sensitivity.resume import Checkpoints


def test_changes_happen_in_order_and_at_an_error_no_more():
    done, go = [], threading.Event()

    def fail():
        raise SamqError("the disk is full")

    with pytest.raises(SamqError, match="the disk is full"), Writer() as writer:
        writer.submit(lambda: (go.wait(), done.append(1)))
        writer.submit(lambda: done.append(2))
        writer.submit(fail)
        writer.submit(lambda: done.append(3))
        assert not done
        go.set()
        while not writer.is_full():  # it never is, but raises the error
            pass
    assert done == [1, 2]


@pytest.mark.parametrize("error, written", [(KeyError, [1, 2]), (None, [1])])
def test_what_waits_is_written_after_an_error_and_else_not(error, written):
    done, begun, go = [], threading.Event(), threading.Event()

    def first():
        begun.set()
        go.wait()
        done.append(1)

    def work():
        with Writer() as writer:
            writer.submit(first)
            writer.submit(lambda: done.append(2))
            begun.wait()
            threading.Timer(0.05, go.set).start()
            if error:
                raise error

    if error:
        with pytest.raises(error):
            work()
    else:
        work()
    assert done == written


def test_no_more_waits_than_there_is_room_for(tmp_path):
    states, go, stopped = [torch.zeros(1000)] * 4, threading.Event(), []
    with Writer() as writer, HiddenStates(None, Checkpoints(tmp_path), writer) as kept:
        writer._room = 10_000  # bytes: of two sets
        writer.submit(go.wait)

        def put():
            for block, state in enumerate(states):
                kept.put(block, 0, state)
                kept.close(block)
                stopped.append(writer.is_full())

        thread = threading.Thread(target=put)
        thread.start()
        thread.join(0.2)
        assert stopped == [False, False, True] and thread.is_alive()
        go.set()
        thread.join()
        writer.submit(lambda: None).result()
        assert all(kept.has(block) for block in range(4))
        assert torch.equal(kept.get(3, 0, torch.device("cpu")), states[3])
        kept.drop(3)
        writer.submit(lambda: None).result()
        assert not kept.has(3) and kept.has(2)
