"""Engines that die, hang, or do not start."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from samq.errors import SamqError
from samq.llamacpp.toolchain import _inspect, find_toolchain
from samq.serving.engine import Loading, require_flags
from samq.serving.metrics import Metrics
from samq.serving.served import KV_Q4_WARNING, Served, fits_beside
from samq.serving.settings import ServingSettings
from samq.serving.source import FileSource
from tests.samq.serving.conftest import FAST, events, put, refused, running
from tests.samq.serving.tiny_chat import write_chat_gguf

ROOT = Path(__file__).parents[3]
STREAM = {"prompt": "hello", "max_tokens": 2000, "temperature": 0, "stream": True}


def test_streams_on_a_killed_engine_end_with_an_error_and_waiting_requests_are_answered(chat_gguf, engine):
    with running(FileSource(chat_gguf), **engine) as server:
        slots = server.server.settings.parallel
        begun = threading.Barrier(slots + 1)

        def stream():
            with httpx.stream("POST", f"{server.url}/v1/completions", json=STREAM, timeout=60) as response:
                pieces = response.iter_text()
                text = next(pieces)
                begun.wait()
                return text + "".join(pieces)

        with ThreadPoolExecutor(8) as pool:
            streams = [pool.submit(stream) for _ in range(slots)]
            begun.wait()
            waiting = [pool.submit(server.complete) for _ in range(3)]
            server.wait(lambda: server.metric("samq_requests_waiting") == 3)
            pid = server.child.pid
            os.kill(pid, signal.SIGKILL)
            server.wait(lambda: server.client.get("/ready").status_code == 503, 2)
            for text in (one.result() for one in streams):
                assert '"code": "engine_lost"' in text and text.endswith("data: [DONE]\n\n")
            assert [one.result().status_code for one in waiting] == [200] * 3
        assert server.client.get("/ready").status_code == 200 and server.child.pid != pid
        assert server.ready()["problem"] is None
        assert server.metric("samq_engine_restarts_total", reason="died") == 1
        assert server.metric("samq_requests_running") == 0


@pytest.mark.slow
def test_an_engine_that_gives_no_sign_of_life_is_killed_and_started_again(chat_gguf):
    with running(FileSource(chat_gguf), hang_timeout_s=2) as server, ThreadPoolExecutor(1) as pool:
        pid = server.child.pid
        with server.client.stream("POST", "/v1/completions", json=STREAM) as response:
            pieces = response.iter_text()
            next(pieces)
            os.kill(pid, signal.SIGSTOP)
            assert '"code": "engine_lost"' in "".join(pieces)
        assert server.complete().status_code == 200 and server.child.pid != pid
        assert server.metric("samq_engine_restarts_total", reason="hung") == 1
        assert pool.submit(server.chat).result().status_code == 200


@pytest.mark.slow
def test_a_hang_shows_though_each_client_gives_up_before_the_next_comes(chat_gguf, engine):
    with running(FileSource(chat_gguf), **engine, hang_timeout_s=4, request_timeout_s=2) as server:
        pid = server.child.pid
        os.kill(pid, signal.SIGSTOP)
        assert server.complete().status_code == 504
        server.wait(lambda: "has not responded for" in str(server.ready()["problem"]), 2)
        server.wait(
            lambda: server.complete().content and server.metric("samq_engine_restarts_total", reason="hung") == 1
        )
        server.wait(lambda: server.client.get("/ready").status_code == 200)
        assert server.child.pid != pid and server.ready()["problem"] is None
        assert server.complete().status_code == 200


@pytest.mark.slow
def test_an_engine_whose_clients_have_left_is_left_alone(chat_gguf, engine):
    with running(FileSource(chat_gguf), **engine, hang_timeout_s=2, request_timeout_s=2) as server:
        pid = server.child.pid
        for _ in range(3):
            with suppress(httpx.ReadTimeout):
                httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 300}, timeout=0.1)
        time.sleep(4)
        assert server.child.pid == pid and server.ready()["problem"] is None
        assert server.complete().status_code == 200


@pytest.mark.slow
def test_a_slow_engine_is_left_alone(chat_gguf):
    """Its answer is not streamed, so that only its answers to probes tell that it works."""
    with running(FileSource(chat_gguf), hang_timeout_s=4) as server, ThreadPoolExecutor(1) as pool:
        pid = server.child.pid
        answer = pool.submit(server.complete, max_tokens=2000)
        server.wait(lambda: server.metric("samq_requests_running") == 1)
        for _ in range(6):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(1)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.1)
        assert answer.result().status_code == 200 and server.child.pid == pid


@pytest.mark.slow
def test_an_engine_that_dies_again_and_again_is_started_less_and_less_often(chat_gguf):
    with running(FileSource(chat_gguf)) as server:
        waits = []
        for _ in range(3):
            began = time.monotonic()
            os.kill(server.child.pid, signal.SIGKILL)
            server.wait(lambda: server.client.get("/ready").status_code == 503)
            server.wait(lambda: server.client.get("/ready").status_code == 200)
            waits.append(time.monotonic() - began)
        assert waits[1] > 1 and waits[2] > 2
        assert server.complete().status_code == 200


def test_no_engine_outlives_its_server(chat_gguf):
    """Not even one that is killed."""
    program = (
        "import asyncio, sys; from pathlib import Path; from samq.serving.app import Server; "
        "from samq.serving.settings import ServingSettings; from samq.serving.source import FileSource\n"
        "async def main():\n"
        "    server = Server(FileSource(Path(sys.argv[1])), ServingSettings(context_tokens=512, threads=1))\n"
        "    await server.watcher.check()\n"
        "    print(server.watcher.serving.child.pid, flush=True)\n"
        "    await asyncio.sleep(600)\n"
        "asyncio.run(main())"
    )
    with subprocess.Popen([sys.executable, "-c", program, chat_gguf], cwd=ROOT, stdout=subprocess.PIPE) as gate:
        child = psutil.Process(int(gate.stdout.readline()))
        gate.kill()
        child.wait(10)
    assert not child.is_running()


def served(gguf, **settings):
    return Served(FileSource(gguf)(), ServingSettings(**{**FAST, **settings}), Metrics(), lambda: None)


def started(gguf, **settings):
    """How a model is loaded, or the error."""

    async def start():
        model = served(gguf, **settings)
        try:
            await model.start()
            return model.loading, model.notes
        finally:
            await model.close()

    return asyncio.run(start())


@pytest.fixture
def engine_program(tmp_path, monkeypatch):
    """Lets a shell script be llama-server; `$REAL` is the real one."""
    toolchain = find_toolchain()

    def install(script):
        folder = tmp_path / "toolchain"
        (folder / "bin").mkdir(parents=True)
        for program in toolchain.bin_folder.iterdir():
            if program.name != "llama-server":
                (folder / "bin" / program.name).symlink_to(program)
        (folder / "lib").symlink_to(toolchain.lib_folder)
        real = toolchain.bin_folder / "llama-server"
        (folder / "bin" / "llama-server").write_text(f"#!/bin/bash\nREAL={real}\n{script}\n")
        (folder / "bin" / "llama-server").chmod(0o755)
        monkeypatch.setenv("SAMQ_LLAMA_CPP", str(folder))
        _inspect.cache_clear()

    yield install
    _inspect.cache_clear()


# What an allocation that fails looks like in llama-server's log, for contexts of over so many tokens in all.
SHORT = """
[[ "$*" =~ --ctx-size\\ ([0-9]+) ]]
if (( BASH_REMATCH[1] > {tokens} )) || [[ "$*" == *"--gpu-layers 99"* ]]; then
  echo "ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 34359738368"
  echo "srv    load_model: failed to load model"
  exit 1
fi
exec $REAL "$@"
"""


def test_when_memory_does_not_suffice_the_context_is_shortened_step_by_step(chat_gguf, engine_program):
    engine_program(SHORT.format(tokens=4096))
    loading, notes = started(chat_gguf, slots=4, context_tokens=8192, gpu_layers=99)
    assert loading.context_tokens == 1024
    assert [note.partition("; trying ")[2] for note in notes] == [
        "as many layers as fit on the GPU and a context of 8192 tokens",
        "as many layers as fit on the GPU and a context of 4096 tokens",
        "as many layers as fit on the GPU and a context of 2048 tokens",
        "as many layers as fit on the GPU and a context of 1024 tokens",
    ]
    assert "failed to allocate buffer of size 34359738368" in notes[0]
    with pytest.raises(SamqError, match=r"ended with exit code 1: .*failed to allocate buffer"):
        started(chat_gguf, slots=4, context_tokens=8192, least_context_tokens=2048)


def test_what_proves_not_to_fit_beside_the_old_model_replaces_it_and_is_as_the_settings_ask(
    tmp_path, chat_gguf, other_gguf, engine_program
):
    engine_program(
        f"""
if [ -e {tmp_path}/busy ] && kill -0 $(cat {tmp_path}/busy) 2>/dev/null; then echo "out of memory"; exit 1; fi
echo $$ > {tmp_path}/busy
exec $REAL "$@"
"""
    )
    put(chat_gguf, tmp_path / "tiny.gguf")
    with running(FileSource(tmp_path / "tiny.gguf")) as server:
        put(other_gguf, tmp_path / "tiny.gguf")
        server.wait(lambda: server.metric("samq_model_reloads_total", result="success") == 2)
        assert server.ready()["loading"]["context_tokens"] == 2048 and server.ready()["loading"]["notes"] == []
        assert server.complete().status_code == 200


def test_an_engine_that_never_gets_ready_is_given_up(chat_gguf, engine_program):
    engine_program("sleep 100")
    with pytest.raises(SamqError, match=r"was not ready after 0\.5 s; raise start_timeout_s"):
        started(chat_gguf, start_timeout_s=0.5)


def test_layers_leave_the_gpu_before_the_context_is_shortened():
    assert list(Loading(4096, 10).attempts(1000, 0)) == [
        *(Loading(4096, layers) for layers in (10, 0)),
        *(Loading(tokens, 0) for tokens in (2048, 1024, 1000)),
    ]
    assert list(Loading(512, None).attempts(512, None)) == [Loading(512, None)]


def test_the_context_is_no_longer_than_the_model_was_trained_for(tmp_path):
    gguf = write_chat_gguf(tmp_path / "tiny.gguf", context=256)
    loading, notes = started(gguf, context_tokens=4096)
    assert loading.context_tokens == 256
    assert notes == ["the context is 256 tokens, the length that the model was trained for"]


def test_a_four_bit_cache_is_warned_of(chat_gguf):
    _, notes = started(chat_gguf, kv_type="Q4_0")
    assert notes == [KV_Q4_WARNING]


def test_what_the_memory_cannot_hold_beside_does_not_fit(tmp_path):
    vast = write_chat_gguf(tmp_path / "vast.gguf", context=2**21, blocks=256)  # 128 GiB of cache, not allocated
    for tokens, fits in ((2**21, False), (512, True)):
        settings = ServingSettings(context_tokens=tokens, slots=1)
        assert fits_beside(Served(FileSource(vast)(), settings, Metrics(), lambda: None), settings) == fits


@pytest.mark.parametrize(
    "engine, flags, reason",
    [
        ("llama-server", {"ctx-size": 99}, "SAMQ sets ctx-size itself; use context_tokens"),
        ("llama-server", {"--api_key": "x"}, "SAMQ sets --api_key itself; use api_keys"),
        ("llama-server", {"load-mode": "mmap"}, "reads the whole file before it serves"),
        ("llama-server", {"sleep-idle-seconds": 60}, "read the file again later"),
        ("llama-server", {"log-disable": True}, "learns from it whether the engine works"),
        ("llama-server", {"no-such-flag": True}, "llama-server refuses them: .*no-such-flag"),
        ("llama-server", {"cache-ram": "much"}, "llama-server refuses them: "),
        ("llama-cpp-python", {"n_ctx": 99}, "SAMQ sets n_ctx itself; use context_tokens"),
        ("llama-cpp-python", {"n_batches": 99}, "llama-cpp-python refuses them: .*"),
    ],
)
def test_a_flag_that_the_engine_does_not_know_or_that_is_samqs_is_one_sentence(engine, flags, reason):
    if engine == "llama-cpp-python":
        pytest.importorskip("starlette_context")
    with pytest.raises(SamqError, match=reason):
        require_flags(ServingSettings(engine=engine, engine_flags=flags))


def test_flags_reach_the_engine(chat_gguf):
    require_flags(ServingSettings(engine_flags={"cache-ram": 0, "context_shift": False}))
    with running(FileSource(chat_gguf), engine_flags={"n-predict": 3}) as server:
        assert server.complete(max_tokens=None).json()["usage"]["completion_tokens"] == 3


def test_repetitions_in_the_text_may_be_proposed(chat_gguf):
    with running(FileSource(chat_gguf), speculation={"kind": "ngram"}) as server:
        assert server.complete(max_tokens=100).json()["usage"]["completion_tokens"] == 100


def test_a_draft_model_may_propose(chat_gguf):
    settings = {"speculation": {"kind": "draft", "draft_model": chat_gguf, "tokens": 4}}
    with running(FileSource(chat_gguf), **settings) as server:
        assert server.complete(max_tokens=60).json()["usage"]["completion_tokens"] == 60
        assert server.scraped("llamacpp:spec_decode_num_accepted_tokens_total") > 0


def test_an_engine_that_is_missing_is_one_sentence(engine_program, tmp_path):
    engine_program("")
    (tmp_path / "toolchain" / "bin" / "llama-server").unlink()
    with pytest.raises(SamqError, match=r"llama-server is missing; run `make setup`"):
        require_flags(ServingSettings())


def test_errors_before_a_stream_begins_have_their_status(chat_gguf):
    with running(FileSource(chat_gguf)) as server:
        refused(server.complete(prompt="x" * 3000, stream=True), 400, "exceeds the available context")
        assert events(server.complete(stream=True))
