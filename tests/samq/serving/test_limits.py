"""A full queue, the time limit, and the API key."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from samq.serving.source import FileSource
from tests.samq.serving.conftest import running
from tests.samq.serving.test_bad_input import refused

LONG = {"prompt": "hello", "max_tokens": 8000, "temperature": 0, "stream": True}


class Occupied:
    """A client that keeps the worker busy for as long as it is wanted."""

    def __init__(self, server):
        self._stream = httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60)

    def __enter__(self):
        self._bytes = self._stream.__enter__().iter_bytes()  # dropped, it would close the connection
        next(self._bytes)

    def __exit__(self, *error):
        self._stream.__exit__(*error)


def test_a_full_queue_refuses_with_a_time_to_come_back_and_takes_what_it_can(chat_gguf):
    with running(FileSource(chat_gguf), queue_size=2) as server, ThreadPoolExecutor(2) as pool:
        with Occupied(server):
            waiting = [pool.submit(server.complete) for _ in range(2)]
            server.wait(lambda: server.metric("llamacpp:requests_deferred") == 2)
            response = server.complete()
            assert refused(response, 429, "queue is full, with 2 requests")["code"] == "queue_full"
            assert 1 <= int(response.headers["retry-after"]) <= 60
        assert [one.result().status_code for one in waiting] == [200, 200]
        assert server.complete().status_code == 200


def test_a_full_queue_refuses_before_it_reads_a_schema(chat_gguf):
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "colour"}}}
    with running(FileSource(chat_gguf), queue_size=0) as server:
        refused(server.complete(response_format=schema), 400)
        with Occupied(server):
            refused(server.complete(response_format=schema), 429)
            refused(server.chat(response_format=schema), 429)


def test_a_client_that_leaves_the_queue_makes_room(chat_gguf):
    with running(FileSource(chat_gguf), queue_size=1) as server, Occupied(server):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json={"prompt": "hello"}, timeout=0.3)
        server.wait(lambda: server.metric("llamacpp:requests_deferred") == 0)
        assert server.metric("llamacpp:requests_processing") == 1
        server.wait(lambda: server.metric("samq_requests_total", endpoint="/v1/completions", status="499") == 1)


def test_without_a_queue_an_idle_server_answers_and_a_busy_one_refuses(chat_gguf):
    with running(FileSource(chat_gguf), queue_size=0) as server:
        assert server.complete().status_code == 200
        with Occupied(server):
            refused(server.complete(), 429)


def test_the_time_limit_ends_an_answer(chat_gguf):
    with running(FileSource(chat_gguf), request_timeout_s=0.5) as server:
        body = {**LONG, "stream": False}
        error = refused(server.client.post("/v1/completions", json=body), 504, "0.5 s")
        assert error["code"] == "request_timeout"
        text = server.client.post("/v1/completions", json=LONG).text
        assert '"code":"request_timeout"' in text and text.endswith("data: [DONE]\n\n")
        server.wait(lambda: server.metric("llamacpp:requests_processing") == 0)
        # counted when the last byte is on its way, which may be after the client has it
        server.wait(lambda: server.metric("samq_requests_total", endpoint="/v1/completions", status="504") == 2)
        server.wait(lambda: server.complete(max_tokens=1).status_code == 200)


def test_the_time_limit_frees_the_worker_of_a_client_that_does_not_read(chat_gguf):
    tokens = 8000
    body = json.dumps({
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": tokens, "stream": True, "logprobs": True, "top_logprobs": 20, "temperature": 0,
    })  # fmt: skip
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with running(FileSource(chat_gguf), request_timeout_s=1) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # what is accepted inherits it
        url = httpx.URL(server.url)
        client.connect((url.host, url.port))
        client.sendall(f"{head}\r\n\r\n{body}".encode())
        server.wait(lambda: server.metric("llamacpp:tokens_predicted_total") > 0)
        server.wait(lambda: server.metric("llamacpp:requests_processing") == 0)
        assert server.metric("llamacpp:tokens_predicted_total") < tokens
        assert server.complete(max_tokens=1).status_code == 200


def test_the_time_limit_counts_the_wait(chat_gguf):
    with running(FileSource(chat_gguf), request_timeout_s=0.5) as server:
        # The worker hangs, as in a batch of llama.cpp, which cannot be interrupted.
        with server.server.engine.model._generating, ThreadPoolExecutor(1) as pool:
            first = pool.submit(server.complete)
            server.wait(lambda: server.metric("llamacpp:requests_processing") == 1)
            response = server.complete()
            assert refused(response, 503, "0.5 s in the queue")["code"] == "queue_timeout"
            assert "retry-after" in response.headers
            assert first.result().status_code == 504
        server.wait(lambda: server.complete(max_tokens=1).status_code == 200)


def test_only_who_has_the_key_may_ask(chat_gguf):
    with running(FileSource(chat_gguf), api_key="secret") as server:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic secret"},
            {"authorization": "é"},
        ):
            sent = {name: value.encode() for name, value in headers.items()}
            response = server.client.post("/v1/completions", json={"prompt": "hello"}, headers=sent)
            assert refused(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        refused(server.client.get("/v1/models"), 401)
        refused(server.client.get("/openapi.json"), 401)
        server.client.headers["authorization"] = "Bearer secret"
        assert server.complete().status_code == 200
        del server.client.headers["authorization"]
        for path in ("/health", "/ready", "/metrics"):
            assert server.client.get(path).status_code == 200, "probes and Prometheus need no key"
