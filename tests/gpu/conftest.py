"""Tests on an NVIDIA GPU; where there is none, they are skipped, as those of a llama.cpp that was built without CUDA are."""

from contextlib import contextmanager

import llama_cpp.llama_cpp as api
import pytest
import torch

from tests.conftest import write_tiny_gguf
from tests.samq.serving.tiny_chat import TEMPLATE, add_byte_vocabulary


@pytest.fixture(scope="session", autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")


@pytest.fixture(autouse=True)
def _first_gpu(gpu):
    """llama.cpp, in this process, leaves its last GPU as the current one."""
    torch.cuda.set_device(0)


@pytest.fixture(scope="session")
def one_gpu(gpu):
    """For what counts the memory of a GPU."""
    if torch.cuda.device_count() > 1:
        pytest.skip("several GPUs: CUDA_VISIBLE_DEVICES=0")


@pytest.fixture(scope="session")
def cuda_build(gpu):
    if not api.llama_supports_gpu_offload():
        pytest.skip("llama.cpp was built without CUDA: CMAKE_ARGS=-DGGML_CUDA=ON make setup")


def write_chat_gguf(path, seed=0, spread=0.002):
    """A model of 380 MB and 16 layers, small enough in its weights that it does not say one token over and over."""
    return write_tiny_gguf(
        path,
        width=1024,
        hidden=2816,
        blocks=16,
        vocabulary=260,
        spread=spread,
        seed=seed,
        context=8192,
        rare=[0, 1, 2],
        add_tokenizer=lambda writer: add_byte_vocabulary(writer, TEMPLATE),
    )


@pytest.fixture(scope="session")
def sharp_gguf(cuda_build, tmp_path_factory):
    """One whose next tokens are not all alike, so that rounding shows."""
    return write_chat_gguf(tmp_path_factory.mktemp("sharp") / "sharp.gguf", spread=0.03)


@pytest.fixture(scope="session")
def chat_gguf(cuda_build, tmp_path_factory):
    return write_chat_gguf(tmp_path_factory.mktemp("chat") / "chat.gguf")


@pytest.fixture(scope="session")
def other_gguf(cuda_build, tmp_path_factory):
    return write_chat_gguf(tmp_path_factory.mktemp("other") / "chat.gguf", seed=1)


@pytest.fixture
def leave(one_gpu):
    """A context manager that takes the GPU's memory, but for some bytes."""

    @contextmanager
    def take(free):
        torch.cuda.empty_cache()
        taken = torch.empty(max(0, torch.cuda.mem_get_info()[0] - free), dtype=torch.uint8, device="cuda")
        try:
            yield
        finally:
            del taken
            torch.cuda.empty_cache()

    return take
