"""Bad input is answered with a 4xx in OpenAI's shape that says what was wrong, and leaves the server as it was."""

import json

import pytest

from samq.serving.source import FileSource
from tests.samq.serving.conftest import running
from tests.samq.serving.tiny_chat import write_chat_gguf
from tests.tiny_models import byte_tokenizer, tiny_llama, write_llama_gguf

ENDPOINTS = ("/v1/completions", "/v1/chat/completions")
JSON = {"content-type": "application/json"}


def refused(response, status, *words):
    """It says what was wrong, as OpenAI's clients expect it."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"], error
    return error


@pytest.fixture(autouse=True)
def still_serves(served):
    yield
    assert served.complete(max_tokens=1).status_code == 200


NOT_JSON_OBJECTS = [
    b"",
    b"{",
    b"nonsense",
    b'{"prompt": "a",}',
    b'{"prompt": "\xff\xfe"}',
    b"[" * 100_000,
    b"null",
    b"[]",
    b"3",
    b'"a"',
    b'{"seed": 1' + b"0" * 5000 + b"}",
]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("body", NOT_JSON_OBJECTS)
def test_a_body_that_is_no_json_object(served, endpoint, body):
    refused(served.client.post(endpoint, content=body, headers=JSON), 400)


def test_a_body_of_another_content_type(served):
    refused(served.client.post("/v1/completions", content=b"prompt=a", headers={"content-type": "text/plain"}), 400)


@pytest.mark.parametrize(
    "field, value",
    [
        ("prompt", None),
        ("prompt", 3),
        ("prompt", {"text": "a"}),
        ("prompt", []),
        ("prompt", ["a", "b"]),
        ("prompt", [1, "a"]),
        ("prompt", [-1]),
        ("prompt", [260]),
        ("prompt", [10**30]),
        ("prompt", "\ud800"),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", "many"),
        ("max_tokens", 10**30),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 2),
        ("top_k", -1),
        ("top_k", 2**31),
        ("repeat_penalty", 0),
        ("repeat_penalty", 5e-324),
        ("presence_penalty", 3),
        ("seed", 2**64),
        ("seed", "a"),
        ("stop", ""),
        ("stop", [""]),
        ("stop", ["a"] * 17),
        ("stop", 3),
        ("stop", "\udfff"),
        ("n", 2),
        ("stream", "perhaps"),
        ("stream_options", {"include": True}),
        ("stream_options", {"include_usage": True}),  # without stream
        ("stream_options", {}),
        ("logprobs", 21),
        ("logprobs", -1),
        ("echo", True),
        ("logit_bias", {"1": 1}),
        ("best_of", 2),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": 3}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "colour"}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"minItems": 10**9, "items": {}}}}),
    ],
)
def test_a_field_of_the_wrong_type_or_range_is_named(served, field, value):
    body = json.dumps({"prompt": "hello", field: value}).encode()
    error = refused(served.client.post("/v1/completions", content=body, headers=JSON), 400)
    assert (error["param"] or field).startswith(field), error


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hello",
        [{"role": "user"}],
        [{"content": "a"}],
        [{"role": "wizard", "content": "a"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": "a", "tool_calls": []}],
    ],
)
def test_messages_that_are_none(served, messages):
    body = json.dumps({"messages": messages}).encode()
    refused(served.client.post("/v1/chat/completions", content=body, headers=JSON), 400, "messages")


def test_what_the_chat_template_refuses_is_said_in_its_words(served):
    refused(served.chat(messages=[{"role": "user", "content": "hello!"}]), 400, "chat template", "no shouting")


@pytest.mark.parametrize("logprobs", [None, False])
def test_what_has_no_effect_is_refused_and_not_ignored(served, logprobs):
    error = refused(served.chat(top_logprobs=0, logprobs=logprobs), 400, "no effect without logprobs; set logprobs to")
    assert (error["param"], error["code"]) == ("top_logprobs", "has_no_effect")
    refused(served.chat(stream_options={"include_usage": True}, stream=logprobs), 400, "no effect without stream;")


def test_tools_are_refused_and_not_ignored(served):
    refused(served.chat(tools=[{"type": "function"}]), 400, "tools")


def test_a_prompt_over_the_context_is_refused_with_the_numbers(served):
    error = refused(served.complete(prompt="x" * 9000), 400, "8192", "9001", "8 more")
    assert error["code"] == "context_length_exceeded"
    refused(
        served.chat(messages=[{"role": "user", "content": "x" * 9000}], max_tokens=None),
        400,
        "8192",
        "no room is left for an answer",
    )


def test_a_prompt_and_answer_over_the_context_are_refused_with_the_numbers(served):
    error = refused(served.complete(prompt="hello", max_tokens=8187), 400, "8192", "6", "8187")
    assert error["param"] == "max_tokens"
    assert served.complete(prompt="hello", max_tokens=8186, stop="\ufffd").status_code == 200


def test_an_empty_prompt_is_begun_by_the_model(served):
    assert served.complete(prompt="").json()["usage"]["prompt_tokens"] == 1  # <s>
    refused(served.complete(prompt=[]), 400, "prompt")


def test_an_unknown_model_is_refused_with_the_name_of_the_known(served):
    error = refused(served.complete(model="gpt-5"), 404, "gpt-5", "tiny")
    assert error["code"] == "model_not_found"


def test_an_unknown_path_and_a_wrong_method_have_the_same_shape(served):
    refused(served.client.get("/v2/completions"), 404)
    refused(served.client.get("/v1/completions"), 405)


def test_a_null_byte_is_a_character_like_others(served):
    assert served.complete(prompt="a\0b").json()["usage"]["prompt_tokens"] == 4


def test_a_huge_body_is_refused_whether_it_says_its_length_or_not(chat_gguf):
    with running(FileSource(chat_gguf), max_body_bytes=2000) as server:
        body = json.dumps({"prompt": "x" * 2000}).encode()
        error = refused(server.client.post("/v1/completions", content=body, headers=JSON), 413, "2000")
        assert error["type"] == "invalid_request_error"
        parts = (body[start : start + 100] for start in range(0, len(body), 100))
        refused(server.client.post("/v1/completions", content=parts, headers=JSON), 413, "2000")
        assert server.complete(prompt="x" * 1800).status_code == 200


def test_a_long_run_of_one_class_is_answered_or_refused_and_ends_no_server(tmp_path):
    """llama.cpp's pattern for this vocabulary overflows the stack of a usual thread."""
    tokenizer = byte_tokenizer(chat_template="{{ messages[-1].content }}")
    network = tiny_llama(vocab_size=300, max_position_embeddings=2**17)
    gguf = write_llama_gguf(network, tmp_path / "tiny.gguf", tokenizer=tokenizer, pre="tekken")
    with running(FileSource(gguf), context_tokens=512) as server:
        error = refused(server.complete(prompt="A" * 60_000), 400, "the prompt has 60000")
        assert error["code"] == "context_length_exceeded"
        error = refused(server.complete(prompt="A" * 1_100_000), 400, "a text has 1100000 characters without a break")
        assert (error["code"], error["param"]) == ("invalid_text", "prompt")
        turn = {"role": "user", "content": "-" * 1_100_000}
        error = refused(server.chat(messages=[turn]), 400, "a text has 1100000 characters without a break")
        assert (error["code"], error["param"]) == ("invalid_text", "messages")
        lost = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, turn]
        error = refused(server.chat(messages=lost), 400, "the model's chat template drops message 1, of the role user")
        assert (error["code"], error["param"]) == ("invalid_messages", "messages")
        assert server.complete().status_code == 200


HALF = "\ud800"


@pytest.mark.parametrize(
    "body",
    [
        {HALF: 1},
        {"prompt": "a", HALF: {HALF: HALF}},
        {"prompt": "a", "model": HALF},
        {"prompt": "a", "user": HALF},
        {"prompt": "a", "stop": ["a", HALF]},
        {"prompt": [HALF]},
        {"prompt": "a", "stream_options": {HALF: 1}, "stream": True},
        {"prompt": "a", "response_format": {"type": HALF}},
        {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {HALF: 1}}}},
        {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [HALF]}}}},
        {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"pattern": HALF}}}},
        {"messages": [{"role": HALF, "content": "a"}]},
        {"messages": [{"role": "user", "content": HALF}]},
        {"messages": [{"role": "user", "content": "a", HALF: 1}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
        {"messages": [{"role": "user", "content": [{"type": HALF, "text": "a"}]}]},
    ],
)
def test_half_a_character_anywhere_in_a_request_is_refused_or_harmless(served, body):
    response = served.client.post(
        f"/v1/{'chat/' if 'messages' in body else ''}completions",
        content=json.dumps({"max_tokens": 1, **body}).encode(),
        headers=JSON,
    )
    assert (response.status_code == 200 and "enum" in str(body)) or refused(response, 400), body


def test_a_chat_needs_a_template(tmp_path):
    with running(FileSource(write_chat_gguf(tmp_path / "plain.gguf", template=None))) as server:
        refused(server.chat(), 400, "no chat template")
        assert server.complete().status_code == 200
