"""The model's file changes under a running server."""

import json
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from samq.gguf.file import file_sha256
from samq.serving import watch
from samq.serving.source import FileSource
from tests.samq.serving.conftest import asking, events, put, refused, running, serves
from tests.samq.serving.tiny_chat import write_chat_gguf, write_silent_gguf


@pytest.fixture
def file(tmp_path, chat_gguf):
    put(chat_gguf, tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


@pytest.mark.slow
def test_another_file_takes_over_while_clients_stream_and_no_request_fails(file, chat_gguf, other_gguf):
    stop = False

    def client(number):
        answers = []
        while not stop:
            body = {"prompt": f"client {number}", "max_tokens": 30, "temperature": 0, "stream": True}
            response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            assert response.status_code == 200
            assert events(response)[-1]["choices"][0]["finish_reason"] == "length"
            answers.append(response.headers["x-samq-sha256"])
        return answers

    with running(FileSource(file), queue_size=64) as server, ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, number) for number in range(8)]
        for gguf in (other_gguf, chat_gguf, other_gguf):
            put(gguf, file)
            server.wait(serves(server, gguf))
            before = server.metric("samq_requests_total", endpoint="/v1/completions", status="200")
            server.wait(
                lambda before=before: (
                    server.metric("samq_requests_total", endpoint="/v1/completions", status="200") > before + 16
                )
            )
        stop = True
        answers = [one.result() for one in clients]
        assert all(len(set(of_one)) == 2 for of_one in answers), "each answer names the version that gave it"
        assert server.metric("samq_model_reloads_total", result="success") == 4
        info = {"name": "tiny", "version": "", "alias": "", "sha256": file_sha256(other_gguf), "plan": ""}
        assert server.metric("samq_model_info", **info) == 1
        assert server.client.get("/metrics").text.count("samq_model_info{") == 1, "the old model is not shown any more"


def test_a_stream_is_finished_by_the_model_that_began_it(file, chat_gguf, other_gguf):
    body = {"prompt": "hello", "max_tokens": 1500, "temperature": 0}
    with running(FileSource(file)) as server:
        expected = server.client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=60
        ) as response:
            parts = response.iter_text()
            text = next(parts)
            old = server.child
            put(other_gguf, file)
            server.wait(serves(server, other_gguf))
            assert old.alive and server.child is not old, "the test must swap within the stream"
            text += "".join(parts)
        lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line][:-1]
        assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == expected
        server.wait(lambda: not old.alive)


def test_a_file_that_is_altered_in_place_or_cut_short_is_told_and_what_serves_is_what_was_read(file, chat_gguf):
    """H3."""
    with running(FileSource(file)) as server:
        before = server.complete(max_tokens=20).json()["choices"][0]["text"]
        for spoil in (lambda: file.write_bytes(b"?" * file.stat().st_size), lambda: os.truncate(file, 1000)):
            spoil()
            server.wait(lambda: "is not served" in (server.ready()["problem"] or ""))
            assert serves(server, chat_gguf)()
            assert server.complete(max_tokens=20).json()["choices"][0]["text"] == before


def test_an_engine_is_not_started_again_with_an_altered_file(file, chat_gguf):
    """H3."""
    with running(FileSource(file)) as server:
        good = file.read_bytes()
        file.write_bytes(good[:-1] + b"?")
        os.kill(server.child.pid, signal.SIGKILL)
        server.wait(lambda: "was altered" in (server.ready()["problem"] or ""))
        assert server.client.get("/ready").status_code == 503
        file.write_bytes(good)
        server.wait(lambda: server.client.get("/ready").status_code == 200)
        assert serves(server, chat_gguf)()


@pytest.mark.parametrize(
    "write, reason",
    [
        (lambda path: path.write_bytes(b"GGUF" + bytes(1000)), "is not a whole GGUF file"),
        (lambda path: path.write_bytes(b""), "is not a whole GGUF file"),
        (write_silent_gguf, "does not answer the warm-up prompt sanely"),
        (lambda path: write_chat_gguf(path, context=16), "does not answer the warm-up prompt sanely"),
    ],
)
def test_what_cannot_serve_leaves_the_old_model_at_work(file, tmp_path, other_gguf, write, reason):
    with running(FileSource(file)) as server:
        sha256 = server.ready()["model"]["sha256"]
        write(tmp_path / "bad.gguf")
        put(tmp_path / "bad.gguf", file)
        server.wait(lambda: server.metric("samq_model_reloads_total", result="failure") == 1)
        server.wait(lambda: server.ready()["problem"])
        ready = server.ready()
        assert ready["model"]["sha256"] == sha256
        assert reason in ready["problem"] and "keeps serving" in ready["problem"]
        assert server.metric("samq_model_reload_failed") == 1
        assert server.complete().status_code == 200

        time.sleep(0.3)
        assert server.metric("samq_model_reloads_total", result="failure") == 1, "it is not tried again and again"

        put(other_gguf, file)
        server.wait(serves(server, other_gguf))
        server.wait(lambda: server.metric("samq_model_reload_failed") == 0)
        assert server.ready()["problem"] is None


def test_a_file_that_is_gone_is_told_and_the_model_serves_on(file):
    with running(FileSource(file)) as server:
        file.unlink()
        server.wait(lambda: server.ready()["problem"])
        assert "put the GGUF back" in server.ready()["problem"]
        assert server.metric("samq_model_lookup_failures_total") >= 1
        assert server.complete().status_code == 200


def test_after_the_file_is_back_the_problem_is_that_of_its_content_again(file, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(1000))
    with running(FileSource(file)) as server:
        put(bad, file)
        server.wait(lambda: "is not a whole GGUF" in (server.ready()["problem"] or ""))
        file.unlink()
        server.wait(lambda: "put the GGUF back" in server.ready()["problem"])
        put(bad, file)
        server.wait(lambda: "is not a whole GGUF" in server.ready()["problem"])
        assert server.metric("samq_model_reloads_total", result="failure") == 1


def test_what_cannot_be_loaded_is_tried_again_less_and_less_often(file, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(watch, "_RETRY_S", (0.4, 60.0))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(1000))
    with running(FileSource(file)) as server:
        put(tmp_path / "bad.gguf", file)
        server.wait(lambda: server.metric("samq_model_reloads_total", result="failure") == 3)
        assert server.complete().status_code == 200
    tried = [record.created for record in caplog.records if "is not a whole GGUF" in record.message]
    assert tried[1] - tried[0] > 0.39 and tried[2] - tried[1] > 0.79


def test_what_is_unfit_to_serve_is_not_tried_again(file, tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "_RETRY_S", (0.0, 0.0))
    with running(FileSource(file)) as server:
        put(write_silent_gguf(tmp_path / "bad.gguf"), file)
        server.wait(lambda: "sanely" in (server.ready()["problem"] or ""))
        time.sleep(0.3)
        assert server.metric("samq_model_reloads_total", result="failure") == 1


def test_before_there_is_a_model_the_server_lives_and_is_not_ready(tmp_path, chat_gguf):
    file = tmp_path / "tiny.gguf"
    with running(FileSource(file), wait=False) as server:
        server.wait(lambda: server.ready()["problem"])
        assert server.client.get("/health").status_code == 200
        assert server.client.get("/ready").status_code == 503
        response = server.complete()
        assert (response.status_code, response.json()["error"]["code"]) == (503, "model_not_loaded")
        assert "retry-after" in response.headers
        assert server.client.get("/v1/models").json()["data"] == []
        put(chat_gguf, file)
        server.wait(serves(server, chat_gguf))
        assert server.complete().status_code == 200


def test_a_model_that_does_not_fit_beside_the_old_one_replaces_it_and_requests_wait(
    file, other_gguf, monkeypatch, tmp_path
):
    """That memory is short is the one thing that is not real here."""
    monkeypatch.setattr(watch, "fits_beside", lambda served, settings: False)
    with running(FileSource(file)) as server:
        with asking(server) as statuses:
            put(other_gguf, file)
            server.wait(serves(server, other_gguf))
            server.wait(lambda: server.client.get("/ready").status_code == 200)
            put(write_silent_gguf(tmp_path / "bad.gguf"), file)
            server.wait(lambda: "sanely" in (server.ready()["problem"] or ""))
            server.wait(lambda: server.client.get("/ready").status_code == 200)
        assert set(statuses) == {200}
        assert "sanely" in server.ready()["problem"] and serves(server, other_gguf)(), "its file is still held open"


def test_without_room_for_both_a_file_that_is_spoilt_in_place_leaves_nothing_to_serve(
    file, chat_gguf, tmp_path, monkeypatch
):
    monkeypatch.setattr(watch, "fits_beside", lambda served, settings: False)
    bad = write_silent_gguf(tmp_path / "bad.gguf").read_bytes()
    with running(FileSource(file)) as server:
        with asking(server) as statuses:
            file.write_bytes(bad)
            server.wait(
                lambda: re.search(r"; and cannot start .* again: .* was altered", server.ready()["problem"] or "")
            )
            assert refused(server.complete(), 503)["code"] == "model_not_loaded"
        assert set(statuses) <= {200, 503}
        assert server.client.get("/ready").status_code == 503 and server.metric("samq_requests_waiting") == 0
        put(chat_gguf, file)
        server.wait(serves(server, chat_gguf))
        assert server.complete().status_code == 200
