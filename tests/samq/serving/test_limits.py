"""What one client may ask of the server: the queue, time limits, sizes, keys, connections."""

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest

from samq.serving.source import FileSource
from tests.samq.serving.conftest import Occupied, refused, running
from tests.tiny_models import byte_tokenizer, tiny_llama, write_llama_gguf

JSON = {"content-type": "application/json"}
LONG = {"prompt": "hello", "max_tokens": 2000, "temperature": 0, "stream": True}
USER = {"role": "user", "content": "hello"}


def connect(server):
    return socket.create_connection(("127.0.0.1", urlsplit(server.url).port), timeout=30)


def test_a_full_queue_refuses_with_a_time_to_come_back_and_takes_what_it_can(chat_gguf):
    with running(FileSource(chat_gguf), slots=1, queue_size=2) as server, ThreadPoolExecutor(2) as pool:
        with Occupied(server):
            waiting = [pool.submit(server.complete) for _ in range(2)]
            server.wait(lambda: server.metric("samq_requests_waiting") == 2)
            response = server.complete()
            assert refused(response, 429, "queue is full, with 2 requests")["code"] == "queue_full"
            assert 1 <= int(response.headers["retry-after"]) <= 60
        assert [one.result().status_code for one in waiting] == [200, 200]
        assert server.complete().status_code == 200


def test_a_client_that_leaves_the_queue_makes_room(chat_gguf):
    with running(FileSource(chat_gguf), slots=1, queue_size=1) as server, Occupied(server):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json={"prompt": "hello"}, timeout=0.3)
        server.wait(lambda: server.metric("samq_requests_waiting") == 0)
        assert server.metric("samq_requests_running") == 1
        server.wait(lambda: server.metric("samq_requests_total", endpoint="/v1/completions", status="499") == 1)


def test_without_a_queue_an_idle_server_answers_and_a_busy_one_refuses(chat_gguf):
    with running(FileSource(chat_gguf), slots=1, queue_size=0) as server:
        assert server.complete().status_code == 200
        with Occupied(server):
            refused(server.complete(), 429)


def test_64_clients_on_a_full_queue_are_each_answered_or_refused(chat_gguf):
    with running(FileSource(chat_gguf), slots=2, queue_size=16) as server, ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda number: server.complete(stream=number % 2 == 0), range(64)))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 18
        assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers[::2] if answer.status_code == 200)
        assert server.metric("samq_requests_running") == server.metric("samq_requests_waiting") == 0


def test_the_time_limit_ends_an_answer(chat_gguf):
    with running(FileSource(chat_gguf), request_timeout_s=0.4, context_tokens=8192) as server:
        body = {**LONG, "max_tokens": 8000}
        error = refused(server.client.post("/v1/completions", json={**body, "stream": False}), 504, "0.4 s")
        assert error["code"] == "request_timeout"
        text = server.client.post("/v1/completions", json=body).text
        assert '"code": "request_timeout"' in text and text.endswith("data: [DONE]\n\n")
        server.wait(lambda: server.metric("samq_requests_running") == 0)
        server.wait(lambda: server.metric("samq_requests_total", endpoint="/v1/completions", status="504") == 2)
        server.wait(lambda: server.complete(max_tokens=1).status_code == 200)


@pytest.mark.slow  # it waits
def test_the_time_limit_counts_the_wait(chat_gguf):
    """A request that began before the one in the slot has no time left before it."""
    body = b'{"prompt": "hello"}'
    head = f"POST /v1/completions HTTP/1.1\r\nhost: here\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    with running(FileSource(chat_gguf), slots=1, request_timeout_s=2) as server, ThreadPoolExecutor(1) as pool:
        os.kill(server.child.pid, signal.SIGSTOP)  # an engine that hangs, as in one long batch
        with connect(server) as early:
            early.sendall(head.encode() + body[:1])
            time.sleep(0.7)
            in_slot = pool.submit(server.complete)
            server.wait(lambda: server.metric("samq_requests_running") == 1)
            early.sendall(body[1:])
            answer = b"".join(iter(lambda: early.recv(65536), b"")).decode()
        assert answer.startswith("HTTP/1.1 503") and "retry-after: " in answer
        assert '"code":"queue_timeout"' in answer and "2 s in the queue" in answer
        assert not in_slot.done()
        assert refused(in_slot.result(), 504)["code"] == "request_timeout"
        os.kill(server.child.pid, signal.SIGCONT)
        server.wait(lambda: server.complete(max_tokens=1).status_code == 200)


def test_the_time_limit_frees_the_slot_of_a_client_that_does_not_read(chat_gguf):
    body = json.dumps({**LONG, "max_tokens": 8000, "logprobs": 20}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    settings = {"slots": 1, "request_timeout_s": 1, "context_tokens": 8192}
    with running(FileSource(chat_gguf), **settings) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", urlsplit(server.url).port))
        client.sendall(head + body)
        server.wait(lambda: server.metric("samq_requests_running") == 1)
        server.wait(lambda: server.metric("samq_requests_running") == 0)
        assert server.complete(max_tokens=1).status_code == 200


@pytest.mark.slow
def test_connections_that_do_not_read_are_closed_and_lock_nobody_out(chat_gguf):
    """Each asks for answers until the server waits for it to read them."""
    ask = b"GET /metrics HTTP/1.1\r\nhost: here\r\n\r\n" * 2000
    with running(FileSource(chat_gguf), request_timeout_s=2, max_connections=4) as server:
        server.client.close()
        silent = [connect(server) for _ in range(4)]
        for one in silent:
            one.setblocking(False)
            one.send(ask)
        deadline = time.monotonic() + 40
        while True:
            try:
                assert httpx.get(f"{server.url}/ready", timeout=5).status_code == 200
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.5)


def test_half_open_connections_are_closed_and_lock_nobody_out(chat_gguf):
    """M3."""
    with running(FileSource(chat_gguf), head_timeout_s=0.5, max_connections=40) as server:
        halves = [connect(server) for _ in range(60)]
        for half in halves[:30]:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")
        assert all(half.recv(1) == b"" for half in halves), "closed: some at once, as too many, and the rest in time"
        assert httpx.get(f"{server.url}/ready").status_code == 200
        assert server.complete().status_code == 200


def test_a_body_that_does_not_come_is_waited_for_so_long(chat_gguf):
    with running(FileSource(chat_gguf), body_timeout_s=0.3) as server, connect(server) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        answer = b"".join(iter(lambda: slow.recv(65536), b""))
        assert b" 408 " in answer and b"the body took longer than 0.3 s" in answer
        assert server.metric("samq_requests_running") == 0


def test_a_connection_is_kept_for_the_next_request(either):
    with connect(either) as kept:
        for _ in range(3):
            kept.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"200 OK" in kept.recv(65536)
            time.sleep(0.05)


NOT_JSON_OBJECTS = [
    b"",
    b"{",
    b"nonsense",
    b'{"prompt": "a",}',
    b'{"prompt": "\xff\xfe"}',
    b'{"prompt": "\\ud800"}',
    b'{"temperature": NaN}',
    b"[" * 100_000,
    b"null",
    b"[]",
    b'"a"',
]


@pytest.mark.parametrize("body", NOT_JSON_OBJECTS)
def test_a_body_that_is_no_json_object_never_reaches_the_engine(either, body):
    for endpoint in ("/v1/completions", "/v1/chat/completions"):
        error = refused(either.client.post(endpoint, content=body, headers=JSON), 400)
        assert error["code"] == "invalid_json"


@pytest.mark.parametrize(
    "fields, status, words",
    [
        ({"messages": [{"role": "user", "content": ""}] * 10_000}, 400, "messages: there are 10000"),  # H4
        ({"messages": [{"role": "user", "content": [{"type": "text"}] * 5000}]}, 400, "content parts: there are 5000"),
        ({"messages": [{"role": "user", "content": [1] * 800_000}]}, 413, "more than 300000 commas"),  # M5
        ({"messages": [USER], **{f"k{number}": 1 for number in range(60_000)}}, 413, "60001 fields"),
        ({"messages": [USER], "stop": ["x"] * 5000}, 400, "stop: there are 5000"),
        ({"prompt": ["x"] * 5000}, 400, "prompt: there are 5000"),
        ({"messages": [USER], "dry_multiplier": 1, "dry_sequence_breakers": ["x"] * 1000}, 400, "16 texts"),
        ({"messages": [USER], "dry_sequence_breakers": ["x" * 100]}, 400, "of 40 characters"),
        ({"messages": [USER], "dry_multiplier": 1, "samplers": "d" * 10_000}, 400, "samplers: it may have 16"),
        ({"messages": [USER], "samplers": ["dry"] * 17}, 400, "samplers: it may have 16"),
        ({"messages": [USER], "samplers": 5}, 400, "samplers: send a list"),
        ({"messages": [USER], "repeat_last_n": 2 * 10**9, "repeat_penalty": 1.1}, 400, "repeat_last_n: it is"),  # 8 GB
        ({"messages": [USER], "dry_penalty_last_n": 2e9, "dry_multiplier": 1}, 400, "dry_penalty_last_n: it is"),
        ({"messages": [USER], "n_probs": 100_000}, 400, "n_probs: it is"),
        ({"messages": [USER], "grammar_lazy": True, "grammar_triggers": []}, 400, "leave it out"),
        ({"messages": [USER], "chat_parser": "{}"}, 400, "chat_parser: the engine sets it"),
    ],
)
def test_too_many_of_anything_are_refused_before_the_engine_sees_them(either, fields, status, words):
    refused(either.client.post("/v1/chat/completions", json=fields), status, words)
    assert either.complete(max_tokens=1).status_code == 200


def schema_of(**schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


@pytest.mark.parametrize(
    "fields, words",
    [
        (schema_of(type="string", pattern="^(a?|b?){99}$"), "over 1000 ways at once"),  # H2
        (schema_of(type="string", pattern="^a{3,2}$"), "minimum of repetitions exceeds"),  # 24 GB of memory
        (schema_of(type="string", minLength=3, maxLength=2), "minimum of repetitions exceeds"),
        (schema_of(type="array", items={}, minItems=9, maxItems=1), "minimum of repetitions exceeds"),
        (schema_of(type="string", pattern="^" + "[a-z]?" * 60 + "$"), "over 1000 ways at once"),
        (schema_of(type="array", minItems=10**9, items={}), "1000000000 repetitions"),
        (schema_of(enum=["x" * 100_000]), "the limit is 65536"),
        (schema_of(**{"$defs": {"a": {"$ref": "#/$defs/a"}}, "allOf": [{"$ref": "#/$defs/a"}]}), "back to itself"),
        (schema_of(anyOf=[{"type": "array", "items": {}, "minItems": 1000}] * 400), "1000000 elements"),
        ({"json_schema": {"enum": list(range(1001))}}, "over 1000 ways at once"),
        ({"grammar": 'root ::= "a"{3,2}'}, "minimum of repetitions exceeds"),
        ({"grammar": 'root ::= "[" root "]" | "[" root "]" | "a"'}, "over 1000 ways at once"),
        ({"grammar": "root ::= " + '"a" ' * 50_000}, "the limit is 65536"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"pattern": "(a?){50}"}}}]},
            "over 1000 ways at once",
        ),
    ],
)
def test_what_would_occupy_the_engine_for_minutes_is_refused(either, fields, words):
    error = refused(either.chat(**fields), 400, words)
    assert error["param"] == next(iter(fields))
    assert either.complete(max_tokens=1).status_code == 200


def test_a_thousand_costly_patterns_are_refused_and_nobody_waits_for_them(either):
    """Counting the matches of each takes 30 ms."""
    patterns = {str(number): {"pattern": f"((a{{40}}){{40}}){{3}}{number}"} for number in range(1000)}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(either.chat, **schema_of(type="object", properties=patterns))
        while not answer.done():
            assert either.client.get("/health", timeout=3).status_code == 200
        refused(answer.result(), 400, "too large to count")


def test_a_sampling_that_people_ask_for_is_taken(served):
    samplers = ["penalties", "dry", "top_k", "top_p", "min_p", "temperature"]
    breakers = {"dry_multiplier": 0.8, "dry_sequence_breakers": ["\n", ":", '"', "*"], "dry_penalty_last_n": 2048}
    served.chat(samplers=samplers, **breakers, repeat_last_n=64, top_logprobs=20, logprobs=True).raise_for_status()
    served.complete(samplers="edkypmxt", n_probs=5).raise_for_status()


def test_a_pattern_that_people_write_is_taken(served):
    answer = served.chat(**schema_of(type="string", pattern="^[0-9]{4}-[0-9]{2}$"), max_tokens=40)
    assert len(json.loads(answer.json()["choices"][0]["message"]["content"])) == 7


@pytest.mark.parametrize("url", ["http://169.254.169.254/latest", "https://example.org/a.png", "file:///etc/passwd"])
def test_the_server_fetches_nothing_for_a_client(either, url):
    part = {"type": "image_url", "image_url": {"url": url}}
    error = refused(either.chat(messages=[{"role": "user", "content": [part]}]), 400, "fetches nothing")
    assert error["code"] == "invalid_url"


def test_a_long_run_of_one_class_is_answered_or_refused_and_ends_no_engine(tmp_path):
    """llama.cpp's pattern for this vocabulary overflows the stack of a usual thread."""
    tokenizer = byte_tokenizer(chat_template="{{ messages[-1].content }}")
    network = tiny_llama(vocab_size=300, max_position_embeddings=2**17)
    gguf = write_llama_gguf(network, tmp_path / "tiny.gguf", tokenizer=tokenizer, pre="tekken")
    with running(FileSource(gguf), context_tokens=512) as server:
        pid = server.child.pid
        refused(server.complete(prompt="A" * 60_000), 400, "exceeds the available context")
        error = refused(server.complete(prompt="A" * 1_000_000), 400, "1000000 characters without a break")
        assert error["code"] == "invalid_text"
        refused(server.chat(messages=[{"role": "user", "content": "-" * 1_100_000}]), 400, "without a break")
        assert server.complete().status_code == 200 and server.child.pid == pid


def test_a_huge_or_compressed_body_is_refused(chat_gguf):
    with running(FileSource(chat_gguf), max_body_bytes=2000) as server:
        body = json.dumps({"prompt": "x" * 2000}).encode()
        refused(httpx.post(f"{server.url}/v1/completions", content=body, headers=JSON), 413, "2000")
        parts = (body[start : start + 100] for start in range(0, len(body), 100))
        refused(httpx.post(f"{server.url}/v1/completions", content=parts, headers=JSON), 413, "2000")
        refused(httpx.post(f"{server.url}/v1/completions", content=b"x", headers={"content-encoding": "gzip"}), 415)
        assert server.complete(prompt="x" * 1800, max_tokens=1).status_code == 200


def test_only_who_has_a_key_may_ask(chat_gguf):
    with running(FileSource(chat_gguf), api_key="secret", api_keys={"ana": "hers"}) as server:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic secret"},
            {"authorization": "é"},
            {"x-api-key": "wrong"},
        ):
            sent = {name: value.encode() for name, value in headers.items()}
            response = server.client.post("/v1/completions", json={"prompt": "hello"}, headers=sent)
            assert refused(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        refused(server.client.get("/v1/models"), 401)
        refused(server.client.get("/openapi.json"), 401)
        for headers in ({"authorization": "Bearer secret"}, {"authorization": "bearer hers"}, {"x-api-key": "hers"}):
            assert server.client.get("/v1/models", headers=headers).status_code == 200
        assert server.metric("samq_requests_by_key_total", key="ana") == 2
        assert server.metric("samq_requests_by_key_total", key="default") == 1
        for path in ("/health", "/ready", "/metrics"):
            assert server.client.get(path).status_code == 200, "probes and Prometheus need no key"


def test_a_page_of_a_named_origin_may_ask_and_another_may_not(chat_gguf):
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    with running(FileSource(chat_gguf), api_key="secret", cors_origins=["https://chat.example"]) as server:
        for origin, allowed in (("https://chat.example", "https://chat.example"), ("https://evil.example", None)):
            answer = server.client.options("/v1/chat/completions", headers={"origin": origin, **asks})
            assert answer.headers.get("access-control-allow-origin") == allowed
            answer = server.client.get("/v1/models", headers={"origin": origin, "authorization": "Bearer secret"})
            assert answer.headers.get("access-control-allow-origin") == allowed


def test_without_the_setting_no_page_may_ask(either):
    assert "access-control-allow-origin" not in either.client.get("/v1/models", headers={"origin": "https://a"}).headers


def test_an_unknown_path_and_a_wrong_method_have_openais_shape(either):
    refused(either.client.get("/v2/completions"), 404)
    refused(either.client.get("/v1/completions"), 405)
