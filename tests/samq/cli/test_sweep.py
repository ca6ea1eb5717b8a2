"""`samq requantize` up to the flow, which tests/end_to_end runs."""

import pytest

from samq.cli.start import PROJECT
from tests.command_line import forked_samq, refused

DEMO = PROJECT / "deployments" / "parameters" / "demo.yaml"


def test_a_wrong_parameter_file_is_refused(samq, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("name: x\n")
    assert refused(samq("requantize", "--config", config), "model: Field required")
    config.write_text(DEMO.read_text().replace("thresholds: []", "thresholds: [0.5, q1.5]"))
    assert refused(samq("requantize", "--config", config), "threshold q1.5 is not in 0..1")
    config.write_text(DEMO.read_text().replace("keep: Q8_0", "keep: Q9_9"))
    assert refused(samq("requantize", "--config", config), "unknown ggml type 'Q9_9'")


def test_a_read_only_samq_folder_is_refused(samq, tmp_path, disk):
    disk.make_read_only()
    done = samq("requantize", "--config", tmp_path / "c.yaml", SAMQ_HOME=str(disk.folder / "samq"))
    assert refused(done, "samq cannot be written to (Read-only file system); set SAMQ_HOME")


@pytest.mark.slow
def test_a_prefect_server_that_does_not_answer_is_one_sentence(tmp_path):
    done = forked_samq("requantize", "--config", DEMO, home=tmp_path / "h", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert refused(done, "Prefect's server does not answer (ConnectError: ")
