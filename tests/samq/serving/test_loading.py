import json
import subprocess
import sys
from pathlib import Path

import pytest

from samq.errors import SamqError
from samq.gguf.file import file_sha256
from samq.llamacpp.fit import SPARE_BYTES
from samq.serving.loading import KV_Q4_WARNING, attempts, fits_beside, load
from samq.serving.settings import ServingSettings
from samq.serving.source import FileSource, find_source
from tests.conftest import write_tiny_gguf
from tests.samq.serving.tiny_chat import write_chat_gguf

ROOT = Path(__file__).parents[3]


def test_layers_leave_the_gpu_before_the_context_is_shortened():
    steps = list(attempts(10, 4096, 1000))
    layers = [layers for layers, context in steps if context == 4096]
    assert layers[0] == 10 and layers[-1] == 0 and layers == sorted(set(layers), reverse=True)
    assert steps[len(layers) :] == [(0, 2048), (0, 1024), (0, 1000)]
    assert list(attempts(0, 512, 512)) == [(0, 512)]


# An address space that this process may not outgrow: llama.cpp's allocation fails as it would on a full machine.
SCARCE = """
import json, logging, resource, sys
from samq.serving.loading import load
from samq.serving.settings import ServingSettings
from samq.serving.source import FileSource

source = FileSource(__import__("pathlib").Path(sys.argv[1]))
settings = ServingSettings(context_tokens=2**20, least_context_tokens=int(sys.argv[2]), warmup_tokens=8, threads=1)
load(source(), ServingSettings(context_tokens=1024, warmup_tokens=8, threads=1)).close()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400 * 2**20,) * 2)
served = load(source(), settings)
print(json.dumps({"context": served.loading.context_tokens, "notes": served.loading.notes}))
served.close()
"""


# The same, where another model serves; the limit leaves room for half of the context beside it.
BESIDE = """
import json, resource, sys
from pathlib import Path
from samq.serving.app import Server
from samq.serving.settings import ServingSettings
from samq.serving.source import FileSource

source, *others = map(FileSource, map(Path, sys.argv[1:]))
settings = ServingSettings(context_tokens=2**18, warmup_tokens=8, threads=1)
server = Server(lambda: source(), settings)
server.watcher.check()
old = server.engine.model
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 280 * 2**20,) * 2)
[source] = others
server.watcher.check()
models = [(model.gguf.sha256, model.loading.context_tokens, model.loading.notes) for model in (old, server.engine.model)]
print(json.dumps({"models": models, "problem": server.watcher.problem}))
server.engine.model.close()
"""


def run_with_little_memory(program, *arguments):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds the address space")
def test_when_memory_does_not_suffice_the_context_is_shortened_step_by_step(tmp_path):
    gguf = write_chat_gguf(tmp_path / "tiny.gguf", context=2**20)  # 512 bytes a token: 512 MiB in all
    done = run_with_little_memory(SCARCE, gguf, 512)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    halvings = len(found["notes"])
    assert halvings >= 1
    assert found["context"] == 2**20 >> halvings
    assert all("cannot make a context of" in note for note in found["notes"])
    assert f"a context of {2**19} tokens" in found["notes"][0]

    done = run_with_little_memory(SCARCE, gguf, 2**20)
    assert "does not fit into memory even with a context of 1048576 tokens" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds the address space")
def test_what_proves_not_to_fit_beside_the_old_model_replaces_it_and_is_as_the_settings_ask(tmp_path):
    old = write_chat_gguf(tmp_path / "old.gguf", context=2**18)  # 386 MiB in all
    new = write_chat_gguf(tmp_path / "new.gguf", context=2**18, seed=1)
    done = run_with_little_memory(BESIDE, old, new)
    assert done.returncode == 0, done.stderr
    assert "does not fit into memory beside" in done.stderr and "cannot make a context of 262144" in done.stderr
    found = json.loads(done.stdout)
    assert found["models"] == [[file_sha256(gguf), 2**18, []] for gguf in (old, new)]
    assert found["problem"] is None


def test_layers_that_leave_too_little_of_a_gpu_to_compute_stay_off_it(chat_gguf, monkeypatch):
    """Memory that ends while llama.cpp computes would end the server, so what loads with none to spare does not count."""
    monkeypatch.setattr("samq.llamacpp.gpu.free_bytes", lambda: [64 * 2**30, SPARE_BYTES - 1])
    settings = ServingSettings(gpu_layers=-1, context_tokens=512)
    served = load(FileSource(chat_gguf)(), settings)
    assert (served.loading.gpu_layers, served.loading.context_tokens) == (0, 512)
    assert served.loading.notes[0].startswith(
        "1023 MiB of a GPU's memory would be left, but llama.cpp may need 1024 MiB"
    )
    served.close()
    monkeypatch.setattr("samq.llamacpp.gpu.free_bytes", lambda: [64 * 2**30, SPARE_BYTES])
    served = load(FileSource(chat_gguf)(), settings)
    assert served.loading.gpu_layers == 3 and not served.loading.notes
    served.close()


def test_what_would_leave_too_little_of_a_gpu_to_compute_does_not_fit_beside(chat_gguf, monkeypatch):
    gguf, settings = FileSource(chat_gguf)(), ServingSettings(gpu_layers=-1, context_tokens=512)
    for free, fits in ((SPARE_BYTES + 64 * 2**20, True), (SPARE_BYTES, False)):
        monkeypatch.setattr("samq.llamacpp.gpu.free_bytes", lambda free=free: [free])
        assert fits_beside(gguf, settings) == fits


def test_the_context_is_no_longer_than_the_model_was_trained_for(tmp_path):
    gguf = write_chat_gguf(tmp_path / "tiny.gguf", context=256)
    served = load(FileSource(gguf)(), ServingSettings(context_tokens=4096))
    assert served.loading.context_tokens == 256
    assert served.loading.notes == ("the context is 256 tokens, the length that the model was trained for",)
    served.close()


def test_a_four_bit_cache_is_warned_of(chat_gguf):
    served = load(FileSource(chat_gguf)(), ServingSettings(kv_type="Q4_0", context_tokens=512))
    assert served.loading.notes == (KV_Q4_WARNING,)
    served.close()


def test_a_model_that_says_nothing_is_not_served(tmp_path):
    gguf = write_chat_gguf(
        tmp_path / "tiny.gguf", spread=0
    )  # all logits are 0: the first token, always, which is empty
    with pytest.raises(SamqError, match=r"does not answer the warm-up prompt sanely: the answer is empty"):
        load(FileSource(gguf)(), ServingSettings())


def test_a_model_without_a_vocabulary_is_not_served(tmp_path):
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(SamqError):
        load(FileSource(gguf)(), ServingSettings())


def test_what_the_memory_cannot_hold_beside_does_not_fit(tmp_path):
    vast = write_chat_gguf(tmp_path / "vast.gguf", context=2**21, blocks=256)  # 128 GiB of cache, not allocated
    gguf = FileSource(vast)()
    assert not fits_beside(gguf, ServingSettings(context_tokens=2**21))
    assert fits_beside(gguf, ServingSettings(context_tokens=512))


@pytest.mark.parametrize(
    "target, reason",
    [
        ("nowhere.gguf", "the file nowhere.gguf does not exist; give a GGUF file, or models:/NAME@production"),
        ("models:/llama", "does not name a model by its alias; write models:/NAME@production"),
        ("models:/llama/3", "does not name a model by its alias"),
    ],
)
def test_a_target_that_is_none_is_one_sentence(target, reason):
    with pytest.raises(SamqError, match=reason):
        find_source(target)
