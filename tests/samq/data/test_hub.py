"""Models and data sets by hub id, from a hub on this machine: the few pages of the Hugging Face hub that are asked for."""

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from prefect.settings import PREFECT_API_URL
from safetensors.torch import load_file

from samq.records import ModelSource
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.hf_model import load_model
from tests.tiny_models import save_folder, tiny_llama

COMMIT = "c0ffee" * 6 + "c0ff"
DROPPED = "the connection is lost"


class Hub(BaseHTTPRequestHandler):
    """Serves `server.root`/org/name and `server.root`/datasets/org/name, at one commit.

    The next requests for a path with one of `server.faults` in it meet these, the last first; `server.requested` has all paths.
    """

    def answer(self):
        path = self.path.split("?")[0]
        self.server.requested.append(path)
        fault = next((faults.pop() for place, faults in self.server.faults.items() if place in path and faults), None)
        if fault == DROPPED:
            self.close_connection = True
            return
        status, body, headers = 404, b"", {"X-Error-Code": "EntryNotFound"}
        if listing := re.match(r"/api/(?:models/|(datasets/))(\w+/\w+)(/\w+)?(/\w+)?(/.+)?", path):
            repository = self.server.root / (listing[1] or "") / listing[2]
            if not repository.is_dir():
                headers = {"X-Error-Code": "RepoNotFound"}
            elif not listing[5]:  # there are no folders in a repository
                status, body = 200, json.dumps(self.describe(repository, listing[3])).encode()
        elif (file := self.server.root / re.sub(r"^/|resolve/\w+/", "", path)).is_file():
            status, body = 200, file.read_bytes()
            headers = {"ETag": hashlib.sha1(body).hexdigest(), "X-Repo-Commit": COMMIT}
        if fault:
            status, body, headers = fault, b"", {}
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = answer

    def describe(self, repository, page):
        files = sorted(repository.iterdir())
        if page == "/tree":
            sizes = {file.name: file.stat().st_size for file in files}
            return [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
        siblings = [{"rfilename": file.name} for file in files]
        return {"id": repository.name, "sha": COMMIT, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}

    def log_message(self, *_):
        """Keep quiet."""


@pytest.fixture
def server(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.faults, server.requested = tmp_path / "hub", {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def hub(tmp_path, server):
    """(folder that is served, run Python code with that hub and an empty cache)"""
    offline = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    environment = {name: value for name, value in os.environ.items() if name not in offline}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def run(code, **settings):
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment | settings, capture_output=True, text=True, check=False)

    return server.root, run


@pytest.mark.e2e
def test_a_hub_id_is_the_model_at_its_commit(hub, tmp_path):
    root, run = hub
    folder = save_folder(tiny_llama(), root / "org" / "tiny")
    other_copies = ("original.pth", "consolidated.safetensors")
    for name in other_copies:
        (folder / name).write_bytes(b"the same weights in another format")
    process = run(
        "from samq.sensitivity.checkpoint import describe_source; print(describe_source('org/tiny').model_dump_json())"
    )
    assert process.returncode == 0, process.stderr
    source, local = ModelSource.model_validate_json(process.stdout), describe_source(folder)
    assert (source.name, source.revision) == ("org/tiny", COMMIT)
    assert (source.weights_digest, source.tokenizer_digest) == (local.weights_digest, local.tokenizer_digest)
    assert not any((source.folder / name).exists() for name in other_copies)
    process = run("from samq.sensitivity.checkpoint import describe_source; describe_source('org/other')")
    assert "SamqError: there is no folder org/other, and the hub did not give a model of that name" in process.stderr


@pytest.mark.e2e
def test_a_download_tells_of_its_bytes_and_draws_nothing_itself(hub):
    root, run = hub
    folder = save_folder(tiny_llama(), root / "org" / "tiny")
    code = "from samq.sensitivity.checkpoint import *; describe_source('org/tiny', progress=lambda *told: print(told))"
    process = run(code)
    assert (process.returncode, process.stderr) == (0, "")
    told = [ast.literal_eval(line) for line in process.stdout.splitlines()]
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert told[-1] == (size, size)
    assert all(done <= total <= size for done, total in told)
    assert run(code).stdout == "", "nothing is downloaded twice"


@pytest.mark.e2e
def test_weights_in_torchs_own_format_are_fetched_where_there_are_no_others(hub):
    root, run = hub
    folder = save_folder(tiny_llama(), root / "org" / "old")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "training_args.bin").write_bytes(b"nothing of the model")
    process = run(
        "from samq.sensitivity.checkpoint import describe_source; print(describe_source('org/old').model_dump_json())"
    )
    assert process.returncode == 0, process.stderr
    source = ModelSource.model_validate_json(process.stdout)
    assert source.weights_digest == describe_source(folder).weights_digest
    assert not (source.folder / "training_args.bin").exists()
    load_model(source, device="cpu")
    (folder / "pytorch_model.bin").rename(folder / "weights.pt")
    (root / "org" / "old").rename(root / "org" / "none")
    process = run("from samq.sensitivity.checkpoint import describe_source; describe_source('org/none')")
    assert "has no weights (model.safetensors or pytorch_model.bin, or shards" in process.stderr


@pytest.mark.e2e
def test_a_data_set_is_loaded_by_its_hub_id(hub):
    root, run = hub
    (root / "datasets" / "org" / "rows").mkdir(parents=True)
    rows = [json.dumps({"body": f"text {number}"}) for number in range(9)]
    (root / "datasets" / "org" / "rows" / "train.jsonl").write_text("\n".join(rows))
    code = "from samq.data.datasets import *; print(sorted(load_texts(DatasetSpec(name='org/rows', fields=('{}',)))))"
    process = run(code.format("body"))
    assert process.stdout.strip() == str([f"text {number}" for number in range(9)]), process.stderr
    assert "of org/rows has no field 'text'; name some of its fields: body" in run(code.format("text")).stderr


ASK = """
from huggingface_hub.utils import httpx
from prefect import flow
from samq.data.datasets import DatasetSpec
from samq.data.hub import is_unreachable
from tasks.source import find_model
from tasks.text import load_text

find_model, load_text = (task.with_options(retry_delay_seconds=0) for task in (find_model, load_text))

@flow
def ask():
    for state in (
        find_model("org/tiny", None, None, return_state=True),
        load_text(DatasetSpec(name="org/rows"), return_state=True),
        find_model("org/other", None, None, return_state=True),
        load_text(DatasetSpec(name="org/others"), return_state=True),
        find_model("org/down", None, None, return_state=True),
        load_text(DatasetSpec(name="org/down"), return_state=True),
    ):
        print(state.name, "|", state.result(raise_on_failure=False))

ask(return_state=True)
try:
    httpx.get("http://127.0.0.1:9")
except httpx.ConnectError as refused:
    print(is_unreachable(refused))
"""


@pytest.mark.e2e
def test_a_hub_that_fails_for_now_is_asked_again_and_one_that_says_no_is_not(hub, server, tmp_path, prefect_home):
    root, run = hub
    save_folder(tiny_llama(), root / "org" / "tiny")
    (root / "datasets" / "org" / "rows").mkdir(parents=True)
    (root / "datasets" / "org" / "rows" / "train.jsonl").write_text(json.dumps({"text": "some text"}))
    # Not 503 for the data sets: huggingface_hub would ask again by itself, for half a minute.
    passing = {"/api/models/org/tiny": [503, DROPPED], "/datasets/org/rows": [520, DROPPED]}
    server.faults = {**passing, "/org/down": [520] * 99}
    settings = {"PREFECT_API_URL": PREFECT_API_URL.value(), "PREFECT_HOME": str(tmp_path / "prefect")}
    process = run(ASK, **settings)
    assert process.returncode == 0, process.stderr
    assert [*passing.values()] == [[], []]
    model, text, no_model, no_text, down_model, down_text, refused = process.stdout.splitlines()
    assert model.startswith("Completed | ") and "org/tiny" in model
    assert text.startswith("Completed | ") and "some text" in text
    assert no_model.startswith("Failed | there is no folder org/other, and the hub did not give a model of that name")
    assert server.requested.count("/api/models/org/other/revision/main") == 1
    assert no_text.startswith("Failed | org/others is not one of") and "the hub gave no such data set" in no_text
    assert len([path for path in server.requested if path.startswith("/datasets/org/others/")]) == 1
    assert down_model.startswith("Failed | there is no folder org/down, and the hub did not answer (")
    assert server.requested.count("/api/models/org/down/revision/main") == 3
    assert down_text.startswith("Failed | org/down is not one of") and "and the hub did not answer (" in down_text
    assert refused == "True"
