"""Whatever a client sends is answered as the OpenAPI description says, never with a 5xx, and ends no engine."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from samq.serving.app import PASSED_ON
from samq.serving.source import FileSource
from tests.samq.serving.conftest import running

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool"]) | VALUES, "content": st.text(max_size=9) | VALUES}
    ),
    min_size=1,
    max_size=3,
)
NAMES = """messages prompt input content tokens temperature top_p top_k min_p seed stop n logprobs top_logprobs logit_bias tools
tool_choice response_format json_schema stream stream_options max_completion_tokens presence_penalty user grammar cache_prompt
echo best_of suffix samplers n_probs chat_template_kwargs reasoning_format documents query""".split()


@pytest.fixture(scope="module")
def server(chat_gguf):
    with running(FileSource(chat_gguf), context_tokens=256, request_timeout_s=600) as running_server:
        yield running_server


@pytest.mark.e2e
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/apply-template"]
)
def test_no_body_is_answered_with_a_5xx(server, path):
    described = server.client.get("/openapi.json").json()["paths"]
    assert set(PASSED_ON) < set(described)
    pid = server.child.pid

    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5), MESSAGES, st.text(max_size=9))
    def ask(fields, messages, text):
        body = {"messages": messages, "prompt": text, "input": text, **fields, "max_tokens": 3, "max_output_tokens": 3}
        answer = server.client.post(path, content=json.dumps(body).encode())
        assert str(answer.status_code) in described[path]["post"]["responses"], answer.text
        assert answer.status_code < 500 or answer.status_code == 501, (body, answer.text)
        if answer.status_code != 200:
            assert "0x" not in answer.text and "json.exception" not in answer.text

    ask()
    assert server.child.pid == pid
