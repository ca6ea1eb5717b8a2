"""What a client gets from a running server when it asks properly."""

import json
import math
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from urllib.parse import urlsplit

import httpx
import pytest

from samq.gguf.file import file_sha256
from samq.serving.grammar import json_grammar
from samq.serving.loading import load
from samq.serving.refusal import Refused
from samq.serving.sampling import SamplerSettings
from samq.serving.settings import ServingSettings
from samq.serving.source import FileSource
from tests.samq.serving.conftest import running
from tests.samq.serving.tiny_chat import write_chat_gguf


def events(response):
    """The bodies of a stream, which must end with [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def text_of(stream):
    return "".join(choice["text"] for event in stream for choice in event["choices"])


def test_a_completion_has_the_tokens_it_says(served):
    body = served.complete(max_tokens=5).raise_for_status().json()
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    assert body["choices"][0]["finish_reason"] == "length"
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (6, 5, 11)  # <s>hello


def test_a_stream_says_the_same_as_the_whole_answer(served):
    whole = served.complete(max_tokens=40).json()
    response = served.complete(max_tokens=40, stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage = events(response)
    assert text_of(chunks) == whole["choices"][0]["text"]
    assert [event["choices"][0]["finish_reason"] for event in chunks][-2:] == [None, "length"]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 40
    assert len({event["id"] for event in [*chunks, usage]}) == 1


def test_a_stream_tells_token_counts_only_if_asked(served):
    assert all("usage" not in event for event in events(served.complete(stream=True)))


def test_a_chat_answer_and_its_stream_say_the_same(served):
    whole = served.chat(max_tokens=20).raise_for_status().json()
    message = whole["choices"][0]["message"]
    assert (whole["object"], message["role"]) == ("chat.completion", "assistant")
    chunks = events(served.chat(max_tokens=20, stream=True))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == message["content"]
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}


def test_a_conversation_goes_through_the_models_template(served):
    turns = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
    ]
    body = served.chat(messages=turns).raise_for_status().json()
    assert body["usage"]["prompt_tokens"] == 1 + len("[system] be brief\n[user] hello\n[assistant] ")


def test_a_template_without_a_system_role_gets_it_in_the_users_turn_and_no_prompt_ends_with_eos(tmp_path):
    template = "{% for m in messages if m.role != 'system' %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
    gguf = write_chat_gguf(tmp_path / "tiny.gguf", template=template, add_eos=True)
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    with running(FileSource(gguf)) as server:
        body = server.chat(messages=turns).raise_for_status().json()
        assert body["usage"]["prompt_tokens"] == 1 + len("[user] be brief\nhello\n[assistant] ")
        assert server.complete(prompt="hello").json()["usage"]["prompt_tokens"] == 1 + len("hello")


def test_a_seed_gives_the_same_answer_again_and_another_another(served):
    one, again, other = (
        served.complete(temperature=1.5, max_tokens=30, seed=seed).json()["choices"][0]["text"] for seed in (7, 7, 8)
    )
    assert one == again != other


@pytest.mark.parametrize("seed", [-1, 2**32 - 1, 2**64 - 1])
def test_the_seed_that_llama_cpp_takes_for_none_is_one_like_others(served, seed):
    one, again = (served.complete(temperature=1.5, max_tokens=30, seed=seed).json()["choices"] for _ in range(2))
    assert one == again


def test_null_is_the_default(served):
    nulls = dict.fromkeys(
        (
            *(
                "max_tokens",
                "temperature",
                "top_p",
                "top_k",
                "min_p",
                "repeat_penalty",
                "presence_penalty",
                "n",
                "stop",
            ),
            *("frequency_penalty", "stream", "stream_options", "logprobs", "response_format", "user", "model"),
        )
    )
    body = {"prompt": "hello", "seed": 5}
    plain, null = (served.client.post("/v1/completions", json=body | more).json() for more in ({}, nulls))
    assert (null["choices"], null["usage"]["completion_tokens"]) == (plain["choices"], 16)
    nulls |= {"top_logprobs": None, "max_completion_tokens": 8}
    body = {"messages": [{"role": "user", "content": "hello"}], "seed": 5, "max_tokens": 8}
    plain, null = (served.client.post("/v1/chat/completions", json=body | more).json() for more in ({}, nulls))
    assert null["choices"] == plain["choices"]


def test_without_a_seed_answers_differ(served):
    one, other = (served.complete(temperature=1.5, max_tokens=30).json()["choices"][0]["text"] for _ in range(2))
    assert one != other


def test_a_stop_sequence_ends_the_answer_before_it(served):
    text = served.complete(max_tokens=60).json()["choices"][0]["text"]
    stop = text[20:23]
    expected = text[: text.index(stop)]
    for stream in (False, True):
        response = served.complete(max_tokens=60, stop=[stop, "never"], stream=stream)
        body = events(response) if stream else [response.json()]
        assert text_of(body) == expected
        assert body[-1]["choices"][0]["finish_reason"] == "stop"


def test_log_probabilities_are_those_of_a_distribution(served):
    logprobs = served.complete(max_tokens=4, logprobs=3).json()["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == 4
    assert logprobs["text_offset"] == [0, 1, 2, 3]  # a token is a byte here, and a character or U+FFFD
    body = served.chat(max_tokens=4, logprobs=True, top_logprobs=20).json()
    for token in body["choices"][0]["logprobs"]["content"]:
        top = [other["logprob"] for other in token["top_logprobs"]]
        assert len(top) == 20 and top == sorted(top, reverse=True)
        assert token["logprob"] == top[0], "temperature 0 takes the best"
        assert 0 < sum(map(math.exp, top)) <= 1 + 1e-6
        assert len(token["bytes"]) == 1


def test_log_probabilities_are_those_before_the_temperature(served):
    cold, hot = (
        served.complete(max_tokens=1, logprobs=1, temperature=temperature, top_k=1).json()["choices"][0]["logprobs"]
        for temperature in (0, 2)
    )
    assert cold["token_logprobs"] == pytest.approx(hot["token_logprobs"], abs=1e-4)


def test_a_stream_carries_every_log_probability(served):
    whole = served.chat(max_tokens=12, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    chunks = events(served.chat(max_tokens=12, logprobs=True, stream=True))
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    streamed = [token for part in parts if part for token in part["content"]]
    assert [token["bytes"] for token in streamed] == [token["bytes"] for token in whole]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_those_of_the_text_before_a_stop_sequence(served, stream):
    def tokens(chunks):
        logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        return [bytes(token["bytes"]) for part in logprobs if part for token in part["content"]]

    body = served.chat(max_tokens=80, logprobs=True).json()
    text, pieces = body["choices"][0]["message"]["content"], tokens([body])
    for begin, length in ((20, 5), (31, 8), (3, 2)):
        stop = text[begin : begin + length]
        response = served.chat(max_tokens=80, logprobs=True, stop=[stop, stop + "never"], stream=stream)
        chunks = events(response) if stream else [response.json()]
        found = tokens(chunks)
        assert found == pieces[: len(found)]
        assert b"".join(found).decode(errors="replace") == text[: text.index(stop)]


def test_json_of_a_schema_fits_the_schema(served):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    for seed in range(3):
        body = served.chat(response_format=response_format, max_tokens=200, temperature=1, seed=seed).json()
        choice = body["choices"][0]
        answer = json.loads(choice["message"]["content"])
        assert choice["finish_reason"] == "stop"
        assert isinstance(answer["ok"], bool) and answer["kind"] in "ab" and len(answer) == 2


def test_a_choice_that_leaves_the_grammar_ends_the_answer_and_not_the_process(chat_gguf):
    """llama.cpp's float32 makes a penalty of 0 of this one, and then a choice that is none."""
    model = load(FileSource(chat_gguf)(), ServingSettings(context_tokens=512))
    sampling = SamplerSettings(repeat_penalty=5e-324, grammar=json_grammar())
    with pytest.raises(Refused, match="leave no choice"), model.in_use():
        for seed in range(20):
            with closing(model.generate(model.tokenize("hello"), sampling.model_copy(update={"seed": seed}))) as tokens:
                list(islice(tokens, 40))
    model.close()


def test_a_json_object_begins_as_one(served):
    text = served.complete(response_format={"type": "json_object"}, max_tokens=3).json()["choices"][0]["text"]
    assert text.startswith("{")


def test_tokens_are_a_prompt_too(served):
    ids = served.complete(prompt=[1, *(3 + byte for byte in b"hello")]).json()
    text = served.complete(prompt="hello").json()
    assert ids["choices"][0]["text"] == text["choices"][0]["text"]
    assert served.complete(prompt=["hello"]).json()["choices"][0]["text"] == text["choices"][0]["text"]


def test_a_prompt_that_begins_alike_is_not_evaluated_again_and_answers_alike(served):
    long = "once upon a time there was a model " * 20
    fresh = served.complete(prompt=long + "A").json()
    served.complete(prompt="something else")
    served.complete(prompt=long + "B")
    reused = served.complete(prompt=long + "A").json()
    assert reused["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(long)
    assert reused["choices"][0]["text"] == fresh["choices"][0]["text"]


def test_without_max_tokens_a_chat_answer_may_fill_the_context(served):
    body = served.chat(max_tokens=None, messages=[{"role": "user", "content": "x" * 8150}]).json()
    assert body["usage"]["total_tokens"] == 8192
    assert body["choices"][0]["finish_reason"] == "length"


def test_many_clients_get_the_answers_that_they_would_get_alone(served):
    def ask(seed):
        return served.complete(seed=seed, temperature=1.5, max_tokens=20).json()["choices"][0]["text"]

    alone = [ask(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone


def test_the_model_is_listed_by_its_name(served):
    assert [model["id"] for model in served.client.get("/v1/models").json()["data"]] == ["tiny"]
    assert served.complete(model="tiny").status_code == 200


def test_ready_says_which_model_and_how_it_was_loaded(served, chat_gguf):
    ready = served.ready()
    assert (ready["status"], ready["problem"]) == ("ready", None)
    assert ready["model"]["sha256"] == file_sha256(chat_gguf)
    assert ready["loading"] == {"context_tokens": 8192, "gpu_layers": 0, "kv_type": "F16", "notes": []}
    assert served.client.get("/health").json() == {"status": "ok"}


def test_a_client_that_leaves_mid_stream_ends_the_work(served):
    before = served.metric("samq_requests_total", endpoint="/v1/completions", status="499")
    body = {"prompt": "hello", "max_tokens": 8000, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body) as response:
        next(response.iter_bytes())
    served.wait(lambda: served.metric("llamacpp:requests_processing") == 0)
    served.wait(lambda: served.metric("samq_requests_total", endpoint="/v1/completions", status="499") == before + 1)
    assert served.complete().status_code == 200


def test_a_client_that_leaves_before_the_answer_ends_the_work(served):
    before = served.metric("samq_requests_total", endpoint="/v1/completions", status="499")
    body = json.dumps({"prompt": "hello", "max_tokens": 8000, "temperature": 0}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", urlsplit(served.url).port)) as connection:
        connection.sendall(head.encode() + body)
        served.wait(lambda: served.metric("llamacpp:requests_processing") == 1)
    served.wait(lambda: served.metric("llamacpp:requests_processing") == 0)
    served.wait(lambda: served.metric("samq_requests_total", endpoint="/v1/completions", status="499") == before + 1)
