"""The server on a GPU: all layers there, the engine's memory shown and given back, and fewer layers where memory is short."""

import pytest

from samq.llamacpp import gpu
from samq.serving.source import FileSource
from tests.samq.serving.conftest import put, running, serves

MIB = 2**20
LAYERS = 17  # llama.cpp counts the output as a layer


@pytest.fixture
def file(tmp_path, chat_gguf):
    put(chat_gguf, tmp_path / "chat.gguf")
    return tmp_path / "chat.gguf"


def test_all_layers_serve_from_the_gpu_and_engines_give_their_memory_back(file, chat_gguf, other_gguf):
    free = min(gpu.free_gpu_bytes())
    with running(FileSource(file)) as server:
        assert server.ready()["loading"]["gpu_layers"] == LAYERS and server.ready()["loading"]["notes"] == []
        answer = server.complete(max_tokens=40).json()
        for gguf in (other_gguf, chat_gguf):
            put(gguf, file)
            server.wait(serves(server, gguf))
            assert server.ready()["loading"]["gpu_layers"] == LAYERS
            assert server.complete(max_tokens=40).status_code == 200
        assert server.complete(max_tokens=40).json()["choices"] == answer["choices"]
        shown = server.client.get("/metrics").text
        assert "samq_process_gpu_memory_bytes" in shown or gpu.used_bytes(server.child.pid) == 0
    assert min(gpu.free_gpu_bytes()) > free - 300 * MIB


@pytest.mark.parametrize("left", [2000, 1200])
def test_where_gpu_memory_is_short_fewer_layers_go_there_and_long_prompts_are_answered(file, leave, left):
    with leave(left * MIB), running(FileSource(file), context_tokens=8192, slots=1) as server:
        loading = server.ready()["loading"]
        assert loading["context_tokens"] == 8192 and loading["gpu_layers"] <= LAYERS
        assert (loading["gpu_layers"] in (0, LAYERS)) == (loading["notes"] == [])
        assert server.complete(prompt="x" * 4000, max_tokens=20).status_code == 200


def test_what_does_not_fit_beside_is_loaded_after_the_old_model_is_freed(file, other_gguf, leave):
    with running(FileSource(file)) as server, leave(900 * MIB):
        put(other_gguf, file)
        server.wait(serves(server, other_gguf))
        assert server.complete().status_code == 200
