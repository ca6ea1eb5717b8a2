import subprocess
import sys

import pytest

from samq.llamacpp.process import run
from samq.llamacpp.reason import reason_in

QUANTIZE = """\
llama_model_loader: - kv  16:  tokenizer.chat_template str = {{ raise_exception('error: unknown role') }}
[   4/  21] blk.0.attn_k.weight - [   256,    128,      1,      1], type = f16, converting to q4_K .. size = 0.06 MiB
[  12/  21] blk.0.ffn_up.weight                  - [   256,    512,      1,      1], type =    f16,
====== llama_model_quantize_impl: imatrix size 192 is different from tensor size 256 for blk.0.ffn_up.weight
llama_model_quantize: failed to quantize: imatrix size 192 is different from tensor size 256 for blk.0.ffn_up.weight
llama_quantize: failed to quantize model from 'f5.gguf'
prepare_imatrix: have 14 importance matrix entries
"""
LOAD = """\
build: 1 (unknown) with GCC
llama_model_load: error loading model: missing tensor 'blk.0.attn_q.weight'
llama_model_load_from_file_impl: failed to load model
main: exiting due to model loading error
"""
ABORT = """\
warning: no usable GPU found, one compiled without support will be ignored
/src/ggml/src/ggml-quants.c:2330: GGML_ASSERT(besti1 >= 0) failed
libggml-base.so(+0x1234)[0x7f]
libggml-base.so(ggml_abort+0x12)[0x7f]
"""


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            QUANTIZE,
            "llama_model_quantize: failed to quantize: imatrix size 192 is different from tensor size 256 for "
            "blk.0.ffn_up.weight",
        ),
        (LOAD, "llama_model_load: error loading model: missing tensor 'blk.0.attn_q.weight'"),
        (ABORT, "/src/ggml/src/ggml-quants.c:2330: GGML_ASSERT(besti1 >= 0) failed"),
        ("llama_model_load_from_file_impl: failed to load model\nbye\n", "llama_model_load_from_file_impl: failed to load model"),
        ("reading\nno luck\n\n", "no luck"),
        ("\n \n", "no output"),
    ],
)  # fmt: skip
def test_the_reason_is_the_first_error_that_says_more_than_that_it_failed(log, reason):
    assert reason_in(log) == reason


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("assert max([1, 2]) < 2  # ty: ignore", "AssertionError in `assert max([1, 2]) < 2`"),
        ("assert False, 'the vocabulary is too short'", "AssertionError: the vocabulary is too short"),
        ("{}['rotary_pct']", "KeyError: 'rotary_pct' in `{}['rotary_pct']`"),
        ("raise ValueError('first line\\nsecond line')", "ValueError: first line"),
        (
            "try: 1 / 0\nexcept ZeroDivisionError as e: raise RuntimeError('it failed') from e",
            "RuntimeError: it failed",
        ),
        ("import json.nothing", "ModuleNotFoundError: No module named 'json.nothing'"),
    ],
)
def test_the_reason_of_a_python_program_is_its_exception(tmp_path, code, reason):
    program = tmp_path / "program.py"
    program.write_text(f"print('INFO: failed to find nothing')\n{code}\n")
    done = subprocess.run(
        [sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert reason_in(f"{done.stdout}closing\n") == reason


def test_a_failed_program_is_reported_with_its_reason(tmp_path):
    script = "echo step 1; echo 'error: no such tensor'; echo 'failed to load model'; echo bye; exit 3"
    with pytest.raises(Exception, match=r"sh failed with exit code 3: error: no such tensor \(log: "):
        run(["sh", "-c", script], log=tmp_path / "log", timeout_s=10)


def test_a_last_line_that_is_an_error_is_the_reason_whatever_was_logged_before():
    log = "ERROR samq.llamacpp.runtime: failed to load a tensor\nerror: llama.cpp cannot load m.gguf: cut short; copy it again\n"
    assert reason_in(log) == "error: llama.cpp cannot load m.gguf: cut short; copy it again"
    assert reason_in("error: no such tensor\nerror: failed to load model\n") == "error: no such tensor"
