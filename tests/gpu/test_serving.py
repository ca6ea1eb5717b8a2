"""The server on a GPU: all layers there, its memory shown and given back, and fewer layers where memory is short."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from samq.llamacpp import gpu
from samq.serving.source import FileSource
from tests.samq.serving.conftest import put, running, serves

ROOT = Path(__file__).parents[2]
MIB = 2**20
LAYERS = 17  # llama.cpp counts the output as a layer


@pytest.fixture
def file(tmp_path, chat_gguf):
    put(chat_gguf, tmp_path / "chat.gguf")
    return tmp_path / "chat.gguf"


def test_all_layers_serve_from_the_gpu_and_models_give_their_memory_back(file, chat_gguf, other_gguf):
    held = []
    with running(FileSource(file)) as server:
        assert server.ready()["loading"]["gpu_layers"] == LAYERS and server.ready()["loading"]["notes"] == []
        answer = server.complete(max_tokens=40).json()
        for gguf in (other_gguf, chat_gguf, other_gguf, chat_gguf):
            put(gguf, file)
            server.wait(serves(server, gguf))
            assert server.ready()["loading"]["gpu_layers"] == LAYERS
            server.wait(lambda: server.complete(max_tokens=40).status_code == 200)
            held.append(gpu.used_bytes())
        assert server.complete(max_tokens=40).json()["choices"] == answer["choices"]
        shown = server.metric("samq_process_gpu_memory_bytes")
        assert shown == pytest.approx(gpu.used_bytes(), abs=64 * MIB) and shown > chat_gguf.stat().st_size
    assert max(held) - min(held) < 1000 * MIB, "at most one model more, while the old one is freed"
    assert gpu.used_bytes() < min(held) - 300 * MIB


# In a process of its own: what llama.cpp does when the GPU's memory ends while it computes is to end the process.
SCARCE = """
import json, sys
from pathlib import Path
import torch
from samq.serving.loading import load
from samq.serving.sampling import SamplerSettings
from samq.serving.settings import ServingSettings
from samq.serving.source import FileSource

gguf = FileSource(Path(sys.argv[1]))()
settings = ServingSettings(context_tokens=8192, threads=8)
load(gguf, settings).close()
taken = torch.empty(torch.cuda.mem_get_info()[0] - int(sys.argv[2]), dtype=torch.uint8, device="cuda")
served = load(gguf, settings)
with served.in_use():
    prompt = [number % 250 + 5 for number in range(4000)]
    answer = [token.id for token, _ in zip(served.generate(prompt, SamplerSettings(temperature=0)), range(20))]
print(json.dumps({"layers": served.loading.gpu_layers, "context": served.loading.context_tokens,
                  "notes": served.loading.notes, "answer": answer}))
"""


def serve_with(gguf, free):
    command = [sys.executable, "-c", SCARCE, str(gguf), str(free)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("free", [2000, 1200, 300])
def test_where_gpu_memory_is_short_fewer_layers_go_there_and_long_prompts_are_answered(one_gpu, chat_gguf, free):
    done = serve_with(chat_gguf, free * MIB)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["context"] == 8192 and len(found["answer"]) == 20
    assert (found["layers"] == LAYERS) == (found["notes"] == [])
    assert (found["layers"] == LAYERS) == (free == 2000)


def test_what_does_not_fit_beside_is_loaded_after_the_old_model_is_freed(file, other_gguf, leave):
    with running(FileSource(file)) as server, leave(900 * MIB):
        put(other_gguf, file)
        server.wait(serves(server, other_gguf))
        assert server.complete().status_code == 200
        assert server.ready()["loading"]["gpu_layers"] >= 1
