"""What /metrics says, against what has happened."""

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from samq.gguf.file import file_sha256
from samq.serving.source import FileSource
from tests.samq.serving.conftest import Occupied, running


@pytest.fixture
def server(chat_gguf):
    with running(FileSource(chat_gguf)) as running_server:
        yield running_server


def samples(server):
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(response.text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_tokens_requests_and_latencies_are_counted(server):
    before = samples(server)
    for _ in range(3):
        server.complete(max_tokens=5, prompt="hello", stream=True)
    server.complete(prompt="x" * 3000)
    server.client.get("/v1/somewhere/else")
    after = samples(server)
    warm_up = before["llamacpp:tokens_predicted_total", ()]
    assert after["llamacpp:tokens_predicted_total", ()] == 15 + warm_up
    assert after["llamacpp:prompt_tokens_total", ()] > before["llamacpp:prompt_tokens_total", ()]
    assert after["llamacpp:requests_processing", ()] == after["samq_requests_running", ()] == 0
    assert after["samq_requests_waiting", ()] == 0 and after["samq_slots", ()] == 4
    by_status = {labels: value for (name, labels), value in after.items() if name == "samq_requests_total"}
    assert by_status[("endpoint", "/v1/completions"), ("status", "200")] == 3
    assert by_status[("endpoint", "/v1/completions"), ("status", "400")] == 1
    assert by_status[("endpoint", "other"), ("status", "404")] == 1, "paths of strangers make no series"
    for name, count in {
        "samq_request_queue_time_seconds": 4,
        "samq_time_to_first_token_seconds": 3,
        "samq_e2e_request_latency_seconds": 3,
    }.items():
        assert after[f"{name}_count", ()] == count
        assert (f"{name}_bucket", (("le", "0.1"),)) in after, "100 ms is the alert's limit"
    assert after["samq_inter_token_latency_seconds_count", ()] >= 3 * 4
    assert after["process_resident_memory_bytes", ()] > 1e7


def test_a_request_that_waits_or_runs_is_shown(server):
    with Occupied(server):
        assert server.metric("samq_requests_running") == 1
        assert server.scraped("llamacpp:requests_processing") == 1


def test_the_model_is_shown_with_all_that_names_it(server, chat_gguf):
    text = server.client.get("/metrics").text
    (line,) = re.findall(r"^samq_model_info\{.*$", text, re.MULTILINE)
    assert f'sha256="{file_sha256(chat_gguf)}"' in line and 'name="tiny"' in line and line.endswith(" 1.0")
    for series in ('model_reloads_total{result="success"} 1.0', 'model_reloads_total{result="failure"} 0.0'):
        assert f"samq_{series}" in text
    assert 'samq_engine_restarts_total{reason="died"} 0.0' in text


def test_a_gpu_on_which_the_driver_does_not_see_the_engine_has_no_sample_and_no_wrong_0(server, monkeypatch):
    name = "samq_process_gpu_memory_bytes"
    for used, shown in ((7, {7}), (0, set()), (None, set())):
        monkeypatch.setattr("samq.llamacpp.gpu.used_bytes", lambda pid, used=used: used)
        assert {value for (sample, _), value in samples(server).items() if sample == name} == shown
