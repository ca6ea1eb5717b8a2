"""What a person got wrong reaches them through the flow as one sentence and exit code 2, whatever Prefect says of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prefect.settings import PREFECT_API_URL

from tests.end_to_end.conftest import SMALL
from tests.tiny_models import save_folder, tiny_llama

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("prefect_home")]

# The command once for each (parameter file, environment), in one process: its imports take longest by far.
COMMANDS = """
import json, os, sys
from samq.cli.app import main

for config, environment in json.loads(sys.argv[1]):
    os.environ |= environment
    try:
        main(["requantize", "--config", config])
    except SystemExit as end:
        print("exit code", end.code, file=sys.stderr)
"""


def test_bad_input_of_the_flow_is_one_sentence_and_exit_code_2(tmp_path):
    model = save_folder(tiny_llama(), tmp_path / "model")
    without_config = save_folder(tiny_llama(), tmp_path / "without-config")
    (without_config / "config.json").unlink()
    cut = save_folder(tiny_llama(), tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    rows, nothing = tmp_path / "rows.jsonl", tmp_path / "nothing"
    rows.write_text("".join(json.dumps({"body": f"w1 w2 w{number}"}) + "\n" for number in range(9)))
    nothing.mkdir()

    def config(source, **dataset):
        wanted = {**SMALL, "name": source.name, "model": {"source": str(source)}}
        if dataset:
            wanted["calibration"] = {**SMALL["calibration"], "dataset": {**dataset, "samples": 5}}
        path = tmp_path / f"{len(cases)}.yaml"
        path.write_text(yaml.safe_dump(wanted))
        return str(path)

    cases = []
    cases.append(((config(without_config), {}), "without-config is not a model folder: it has no config.json"))
    cases.append(((config(cut), {}), "model.safetensors has 74316 bytes where its header promises 74416"))
    cases.append(((config(model, name=str(rows)), {}), "has no field 'text'; name some of its fields: body"))
    cases.append(((config(model), {"SAMQ_LLAMA_CPP": str(nothing)}), f"llama-quantize is not in {nothing}/bin"))

    environment = {
        **os.environ,
        "SAMQ_HOME": str(tmp_path / "samq"),
        "PREFECT_API_URL": PREFECT_API_URL.value(),
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "COLUMNS": "400",
    }
    command = [sys.executable, "-c", COMMANDS, json.dumps([arguments for arguments, _ in cases])]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    said = done.stderr.split("exit code ")
    assert [part[:2] for part in said[1:]] == ["2\n"] * len(cases), done.stderr
    for part, (_, message) in zip(said, cases, strict=False):
        (sentence,) = [line for line in part.splitlines() if line.startswith("samq: ")]
        assert message in sentence
    assert "Traceback" not in done.stderr
