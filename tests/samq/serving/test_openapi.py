"""Whatever fits the OpenAPI description, or does not, is answered as the description says, and never with a 5xx."""

import pytest

from samq.serving.source import FileSource
from tests.samq.serving.conftest import running

ENDPOINTS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
]


@pytest.fixture(scope="module")
def url(chat_gguf):
    # A short context keeps answers short; a busy machine must not run into the time limit.
    with running(FileSource(chat_gguf), context_tokens=256, request_timeout_s=600) as server:
        yield server.url


@pytest.mark.e2e
@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("method, path", ENDPOINTS)
def test_no_request_is_answered_with_a_5xx(url, method, path, mode):
    # Imported here: it takes seconds, of which the fast tests have no use.
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

    CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]
    operation = schemathesis.openapi.from_url(f"{url}/openapi.json")[path][method]
    mode = GenerationMode(mode)
    examples = 100 if method == "POST" else 5

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case):
        if isinstance(case.body, dict):
            case.body.pop("model", None)  # a made-up name is a 404, whatever the rest is
        case.call_and_validate(checks=CHECKS)

    if method == "GET" and mode is GenerationMode.NEGATIVE:
        pytest.skip("there is nothing to get wrong")
    ask()
