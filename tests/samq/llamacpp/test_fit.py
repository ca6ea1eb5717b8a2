"""What the GPUs hold of a model: llama.cpp's own program is asked, and its answer reaches llama.cpp's library."""

import logging
from pathlib import Path

import numpy as np
import pytest

from samq.errors import SamqError, ToolError
from samq.llamacpp.fit import Room, choose_gpu_share, fit, planned_gpu_bytes, read_device_bytes, read_options
from samq.llamacpp.gpu_share import GpuShare
from samq.llamacpp.runtime import Model, captured_log
from samq.llamacpp.toolchain import PROGRAMS
from tests.conftest import write_tiny_gguf
from tests.samq.serving.tiny_chat import TEMPLATE, add_byte_vocabulary

MIB = 2**20
EXPERTS = r"blk\.3\.ffn_(gate|up|gate_up|down).*=CUDA1,blk\.4\.ffn_(up|down|gate_up|gate)_(ch|)exps=CPU"
ROOM = Room(300, sequences=4, kv_type="Q8_0")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "tiny.gguf"
    tokenizer = dict(vocabulary=260, add_tokenizer=lambda writer: add_byte_vocabulary(writer, TEMPLATE))
    return write_tiny_gguf(path, spread=0.1, **tokenizer)


@pytest.fixture
def has_gpu(monkeypatch):
    monkeypatch.setattr(GpuShare, "default", classmethod(lambda cls: cls(-1)))


@pytest.fixture
def prints(tmp_path, monkeypatch):
    """Let llama-fit-params be a script that prints a text, and keeps its arguments in the file that this returns."""

    def install(text, code=0) -> Path:
        for name in (*PROGRAMS, "llama-fit-params"):
            script = tmp_path / "bin" / name
            script.parent.mkdir(exist_ok=True)
            script.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/arguments\ncat <<'END'\n{text}\nEND\nexit {code}\n")
            script.chmod(0o755)
        monkeypatch.setenv("SAMQ_LLAMA_CPP", str(tmp_path))
        return tmp_path / "arguments"

    return install


def test_options_are_read_as_llama_fit_params_prints_them():
    assert read_options("-c 4096 -ngl -1\n") == GpuShare(-1)
    assert read_options("0.1 I main: done\n-c 4096 -ngl 20\n") == GpuShare(20)
    share = read_options(f'-c 512 -ngl 48 -ts 20,28 -ot "{EXPERTS}"\n')
    assert share.layers == 48 and share.split == (20, 28)
    assert share.overrides == (
        (r"blk\.3\.ffn_(gate|up|gate_up|down).*", "CUDA1"),
        (r"blk\.4\.ffn_(up|down|gate_up|gate)_(ch|)exps", "CPU"),
    )
    assert share.describe(81) == "48 of 81, parts of 2 in host memory"
    with pytest.raises(ToolError, match="did not print -ngl"):
        read_options("failed\n")


def test_a_plan_names_the_devices():
    told = read_device_bytes("CUDA0 100 20 3 \nCUDA1 50 0 7 \nHost 9 9 9 \n")
    assert told == {"CUDA0": 123 * MIB, "CUDA1": 57 * MIB, "Host": 27 * MIB}
    with pytest.raises(ToolError, match="printed no plan"):
        read_device_bytes("error\n")


def test_shares_are_said_in_layers():
    assert [GpuShare(layers).describe(33) for layers in (0, -1, 20, 99)] == ["none", "33 of 33", "20 of 33", "33 of 33"]


def test_the_real_program_takes_what_it_is_asked(gguf):
    """Without a GPU everything is in host memory, so that nothing needs to be left out."""
    share = fit(gguf, ROOM)
    assert share.layers in (-1, 3) and share.split == share.overrides == ()
    assert planned_gpu_bytes(gguf, GpuShare(0), Room(256, kv_type="F32")) == 0
    assert planned_gpu_bytes(gguf, GpuShare(2, overrides=((r"blk\.1\.ffn_down.*", "CPU"),)), ROOM) >= 0
    with pytest.raises(ToolError, match="llama-fit-params failed with exit code 1"):
        fit(gguf.with_name("nothing.gguf"), ROOM)


def test_what_fits_is_asked_with_the_context_that_is_needed(gguf, prints, has_gpu, caplog):
    arguments = prints(f'-c 2048 -ngl 2 -ot "{EXPERTS}"')
    with caplog.at_level(logging.WARNING):
        share = choose_gpu_share(gguf, None, lambda model: Room(model.trained_tokens * 4, 4, "Q8_0"))
    assert (share.layers, len(share.overrides)) == (2, 2)
    assert "tiny.gguf: layers on the GPU: 2 of 3, parts of 2 in host memory; the rest" in caplog.text
    assert arguments.read_text().split() == [
        *("--model", str(gguf), "--ctx-size", "2048", "--parallel", "4", "--cache-type-k", "q8_0"),
        *("--cache-type-v", "q8_0", "--ubatch-size", "512", "--swa-full", "--fit-target", "1024"),
    ]
    arguments = prints("CUDA0 10 2 3 \nHost 1 1 1 ")
    assert (
        planned_gpu_bytes(gguf, GpuShare(2, (1, 1), (("a.*", "CPU"), ("b", "CUDA1"))), Room(10, kv_type="F32"))
        == 15 * MIB
    )
    assert arguments.read_text().split()[-10:] == [
        *("--flash-attn", "off", "--fit-print", "on", "--gpu-layers", "2"),
        *("--tensor-split", "1,1", "--override-tensor", "a.*=CPU,b=CUDA1"),
    ]


def test_where_llama_cpp_cannot_tell_all_layers_go_to_the_gpu_and_the_log_says_why(gguf, prints, has_gpu, caplog):
    prints("E common_fit_params: failed to fit params", code=1)
    with caplog.at_level(logging.WARNING):
        assert choose_gpu_share(gguf, None, lambda _: ROOM) == GpuShare(-1)
    assert "cannot tell how many layers" in caplog.text and "failed with exit code 1" in caplog.text
    assert "(log:" not in caplog.text


def test_what_the_user_set_is_used_and_without_a_gpu_nobody_is_asked(gguf, prints, monkeypatch):
    arguments = prints("-c 1 -ngl 1")
    for layers in (0, 7, -1):
        assert choose_gpu_share(gguf, layers, lambda _: pytest.fail("asked")) == GpuShare(layers)
    monkeypatch.setattr(GpuShare, "default", classmethod(lambda cls: cls(0)))
    assert choose_gpu_share(gguf, None, lambda _: pytest.fail("asked")) == GpuShare(0)
    assert not arguments.exists()


def logits(gguf, share):
    with Model(gguf, gpu_layers=share) as model, model.context(64, threads=1) as context:
        return context.decode(np.arange(40), np.arange(40), 0, True).copy()


def test_overrides_and_splits_reach_llama_cpp(gguf):
    moved = GpuShare(2, split=(2.0,), overrides=((r"blk\.1\.ffn_(gate|up|gate_up|down).*", "CPU"),))
    with captured_log() as log:
        moved_logits = logits(gguf, moved)
    overridden = [line.split()[1] for line in log() if "buffer type overridden to CPU" in line]
    assert sorted(overridden) == [f"blk.1.ffn_{part}.weight" for part in ("down", "gate", "up")]
    np.testing.assert_allclose(moved_logits, logits(gguf, GpuShare(0)), atol=1e-3)
    with pytest.raises(SamqError, match=r"no buffer type CUDA77 here, but .*CPU"):
        Model(gguf, gpu_layers=GpuShare(2, overrides=((".*", "CUDA77"),)))
    with pytest.raises(SamqError, match=r"split over 999 GPUs, but llama\.cpp knows"):
        Model(gguf, gpu_layers=GpuShare(2, split=(1.0,) * 999))
