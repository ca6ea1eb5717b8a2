"""What clients get from a running server: the engine's answers, as they come."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from gguf import TokenType

from samq.gguf.file import file_sha256
from samq.serving.engine import ENGINES, Files, Loading
from samq.serving.settings import ServingSettings
from samq.serving.source import FileSource
from tests.samq.serving.conftest import Occupied, events, refused, running, text_of
from tests.samq.serving.tiny_chat import write_chat_gguf

USER = {"role": "user", "content": "hello"}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def test_a_stream_says_the_same_as_the_whole_answer(either):
    whole = either.complete(max_tokens=20).raise_for_status()
    stream = either.complete(max_tokens=20, stream=True)
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert text_of(events(stream)) == whole.json()["choices"][0]["text"]
    assert whole.json()["model"] == "tiny" and whole.json()["usage"]["completion_tokens"] >= 20


def test_a_chat_and_its_stream_say_the_same(either):
    content = either.chat(max_tokens=12).raise_for_status().json()["choices"][0]["message"]["content"]
    deltas = [
        choice["delta"] for event in events(either.chat(max_tokens=12, stream=True)) for choice in event["choices"]
    ]
    assert "".join(delta.get("content") or "" for delta in deltas) == content != ""


def test_answers_name_the_version(either, chat_gguf):
    for stream in (False, True):
        assert either.complete(stream=stream).headers["x-samq-sha256"] == file_sha256(chat_gguf)
    assert either.chat(messages=3).headers["x-samq-sha256"] == file_sha256(chat_gguf), "an error of the engine's"


def test_an_error_of_the_engines_has_openais_shape_and_no_internals(either):
    for body in (b'{"messages": 3}', b'{"messages": [{"role": "user", "content": {"a": 1}}]}'):
        error = refused(either.client.post("/v1/chat/completions", content=body), 400)
        assert "json.exception" not in error["message"] and "0x" not in error["message"]
    assert either.complete().status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions/input_tokens", {"messages": [USER]}),
        ("/responses/input_tokens", {"input": "hello"}),
        ("/v1/messages/count_tokens", {"messages": [USER]}),
    ],
)
def test_tokens_of_a_prompt_are_counted(served, path, body):
    counted = served.client.post(path, json=body).raise_for_status().json()["input_tokens"]
    assert counted == served.chat(max_tokens=1).json()["usage"]["prompt_tokens"] > 1


def test_many_clients_are_answered_at_the_same_time(served):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: served.complete(prompt=f"{number}", max_tokens=100), range(8)))
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [100] * 8
    assert served.scraped("llamacpp:n_busy_slots_per_decode") > 1


@pytest.mark.parametrize(
    "message",
    [
        {"content": "Hello", "refusal": None},
        {
            "content": "Hello",
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "tool_calls": None,
        },
        {"content": "Hello", "reasoning_content": None, "name": None},
        {"content": "Hello", "tool_calls": []},
        {"content": None},
        {"content": ""},
    ],
)
def test_the_clients_own_answer_sent_back_is_taken(served, message):
    """H1."""
    served.chat(messages=[USER, {"role": "assistant", **message}, USER]).raise_for_status()


def test_tools_several_choices_and_log_probabilities_are_the_engines(served):
    served.chat(tools=[TOOL]).raise_for_status()
    assert len(served.chat(n=2).json()["choices"]) == 2
    logprobs = served.chat(logprobs=True, top_logprobs=3, max_tokens=4).json()["choices"][0]["logprobs"]["content"]
    assert logprobs and all(len(token["top_logprobs"]) == 3 for token in logprobs)


def test_json_of_a_schema_fits_the_schema(served):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    choice = served.chat(response_format=response_format, max_tokens=200).json()["choices"][0]
    answer = json.loads(choice["message"]["content"])
    assert isinstance(answer["ok"], bool) and answer["kind"] in "ab" and len(answer) == 2


def test_the_seed_minus_one_is_none(either):
    """L."""
    answers = {either.complete(seed=-1, temperature=1.5, max_tokens=30).text.split('"text"')[1][:60] for _ in range(3)}
    assert len(answers) == 3


def test_other_endpoints_are_passed_on(served):
    tokens = served.client.post("/v1/tokenize", json={"content": "hello"}).json()["tokens"]
    assert len(tokens) == 5
    assert served.client.post("/detokenize", json={"tokens": tokens}).json()["content"] == "hello"
    answer = served.client.post("/v1/responses", json={"input": "hi", "max_output_tokens": 4}).raise_for_status().json()
    assert answer["object"] == "response"
    refused(served.client.post("/v1/embeddings", json={"input": "a"}), 501, "embeddings")
    for path in ("/slots", "/props", "/lora-adapters", "/v1/stream", "/tools"):
        assert served.client.get(path).status_code == served.client.post(path, json={}).status_code == 404


def test_embeddings_need_the_engines_flag(chat_gguf):
    with running(FileSource(chat_gguf), engine_flags={"embeddings": True, "pooling": "mean"}) as server:
        answer = server.client.post("/v1/embeddings", json={"input": ["a", "b"]}).raise_for_status().json()
        assert len(answer["data"]) == 2 and len(answer["data"][0]["embedding"]) == 128
        official = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0)
        (first, _) = official.embeddings.create(model="tiny", input=["a", "b"]).data
        assert first.embedding == pytest.approx(answer["data"][0]["embedding"], abs=1e-6)


def test_the_model_is_listed_and_found_by_its_name(either):
    assert [model["id"] for model in either.client.get("/v1/models").json()["data"]] == ["tiny"]
    assert either.client.get("/v1/models/tiny").json()["id"] == "tiny"
    error = refused(either.client.get("/v1/models/gpt-5"), 404, "gpt-5", "tiny")
    assert error["code"] == "model_not_found"


@pytest.mark.parametrize("name", ["tiny", None, ""])
def test_the_model_may_be_named_or_not(either, name):
    either.complete(model=name).raise_for_status()


def test_another_models_name_is_refused_unless_it_is_one_of_the_settings(either, chat_gguf):
    refused(either.complete(model="gpt-5"), 404, "gpt-5", "tiny")
    for names in (["gpt-5"], ["*"]):
        with running(FileSource(chat_gguf), model_names=names) as server:
            server.complete(model="gpt-5").raise_for_status()


def test_ready_says_which_model_and_how_it_was_loaded(served, chat_gguf):
    ready = served.ready()
    assert (ready["status"], ready["problem"]) == ("ready", None)
    assert ready["model"]["sha256"] == file_sha256(chat_gguf)
    loading = {"engine": "llama-server", "slots": 4, "context_tokens": 2048, "kv_type": "F16", "notes": []}
    assert ready["loading"].items() >= loading.items()


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/v1/models/tiny"])
def test_head_is_get_without_a_body(either, path):
    """L."""
    answer = either.client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0_gets_the_answer_without_chunks(either, stream):
    """L."""
    body = json.dumps({"prompt": "hello", "max_tokens": 4, "temperature": 0, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.0\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", urlsplit(either.url).port), timeout=60) as connection:
        connection.sendall(head + body)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"200 OK" in head and b"chunked" not in head.lower()
    assert body.endswith(b"data: [DONE]\n\n") if stream else json.loads(body)["usage"]["completion_tokens"] == 4


def test_a_client_that_leaves_mid_stream_ends_the_work(served):
    before = served.metric("samq_requests_total", endpoint="/v1/completions", status="499")
    body = {"prompt": "hello", "max_tokens": 2000, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body) as response:
        next(response.iter_bytes())
    served.wait(lambda: served.metric("samq_requests_total", endpoint="/v1/completions", status="499") == before + 1)
    served.wait(lambda: served.scraped("llamacpp:requests_processing") == 0)
    assert served.metric("samq_requests_running") == 0


def test_a_client_that_leaves_before_the_answer_ends_the_work(served):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/completions", json={"prompt": "hello", "max_tokens": 2000}, timeout=0.5)
    served.wait(lambda: served.metric("samq_requests_running") == 0)
    served.wait(lambda: served.scraped("llamacpp:requests_processing") == 0)


def test_a_stream_that_waits_gets_comments_and_then_its_answer(chat_gguf):
    with running(FileSource(chat_gguf), slots=1, comment_interval_s=0.1) as server, ThreadPoolExecutor(1) as pool:
        with Occupied(server):
            waiting = pool.submit(server.complete, stream=True)
            server.wait(lambda: server.metric("samq_requests_waiting") == 1)
            time.sleep(0.3)
        answer = waiting.result()
        assert answer.status_code == 200 and answer.text.startswith(": waiting\n\n")
        assert len(events(answer)) >= 8


def test_a_prompt_does_not_end_with_eos_whatever_the_tokenizer_adds(engine, tmp_path):
    plain, adding = (write_chat_gguf(tmp_path / f"{add_eos}.gguf", add_eos=add_eos) for add_eos in (False, True))
    answers = []
    for path in (plain, adding):
        with running(FileSource(path), **engine) as server:
            answers.append([server.complete().json(), server.chat().json()])
    for one, other in zip(*answers, strict=True):
        assert one["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"]
        assert one["choices"] == other["choices"]


@pytest.mark.parametrize("kind", ["CONTROL", "NORMAL", "USER_DEFINED"])
def test_the_text_of_an_end_token_is_no_part_of_an_answer(engine, kind, tmp_path):
    path = write_chat_gguf(tmp_path / "end.gguf", end=("[END]", TokenType[kind]))
    with running(FileSource(path), **engine) as server:
        for own in ({}, {"stop": None}, {"stop": "x"}, {"stop": ["x", "y"]}):
            answer = server.complete(logit_bias={"2": 100}, **own).json()["choices"][0]
            assert (answer["text"], answer["finish_reason"]) == ("", "stop")
        for own in ({}, {"stop": "x"}):
            answer = server.chat(logit_bias={"2": 100}, **own).json()["choices"][0]
            assert (answer["message"]["content"], answer["finish_reason"]) == ("", "stop")


def flag_of(tmp_path, flag, **flags):
    """The value that llama-server is started with; None without it."""
    files, settings = Files(tmp_path, "model.gguf"), ServingSettings(engine_flags=flags)
    arguments = ENGINES["llama-server"].command(files, "name", Loading(512, 0), settings).arguments
    assert arguments.count(flag) <= 1
    return arguments[arguments.index(flag) + 1] if flag in arguments else None


def test_overrides_of_the_metadata_come_on_top(tmp_path):
    given = partial(flag_of, tmp_path, "--override-kv")
    assert given(override_kv="a=int:1") == "tokenizer.ggml.add_eos_token=bool:false,a=int:1"
    assert given(embeddings=True) is None  # such a model's result is that of EOS


def test_no_answer_waits_for_the_cache_of_prompts_unless_it_is_asked_for(tmp_path):
    assert flag_of(tmp_path, "--cache-ram") == "0"
    assert flag_of(tmp_path, "--cache-ram", cache_ram=8192) == "8192"
