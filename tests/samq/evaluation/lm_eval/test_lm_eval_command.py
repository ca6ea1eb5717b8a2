"""The model as `samq lm-eval` finds and runs it: arguments, float32, the demo's model."""

import errno
import json
import os
import re
import subprocess
import tempfile
from functools import partial

import numpy as np
import pytest
from gguf import GGUFWriter
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from tokenizers import pre_tokenizers

from samq.data.datasets import DatasetSpec, load_texts
from samq.errors import SamqError
from samq.evaluation.lm_eval.benchmark_tasks import TaskLibrary
from samq.evaluation.lm_eval.float32 import load_float32
from samq.evaluation.lm_eval.harness import GgufLM
from samq.evaluation.lm_eval.room import benchmark_room
from samq.evaluation.settings import BenchmarkSettings
from samq.gguf.file import read_tensors
from samq.llamacpp.runtime import Model
from samq.llamacpp.toolchain import environment, program
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.hf_model import load_model
from tests.command_line import forked_samq, refused
from tests.samq.evaluation.lm_eval.hf_pair import TEXTS, requests

ROOM = partial(benchmark_room, None, "F32")


def test_lm_eval_finds_the_model_by_name(pair):
    lm = get_model("samq-gguf").create_from_arg_string(
        f"gguf={pair.path},context_tokens=32,threads=1", {"batch_size": 1, "max_batch_size": None, "device": None}
    )
    assert isinstance(lm, GgufLM) and lm.max_length == 32
    lm.model.close()
    for arguments, message in (
        ("pretrained=gpt2", "missing a required argument: 'gguf'; write gguf=FILE"),
        ("gguf=tiny.gguf,dtype=float32", "unexpected keyword argument 'dtype'; write gguf=FILE"),
    ):
        with pytest.raises(SamqError, match=message):
            GgufLM.create_from_arg_string(arguments)
    with pytest.raises(SamqError, match="a KV cache cannot have the type 'f16'; choose one of F32, F16, Q8_0, Q4_0"):
        GgufLM.create_from_arg_string(f"gguf={pair.path},kv_type=f16")


def test_float32_rounds_nothing_and_keeps_what_is_quantized(pair, tmp_path, monkeypatch, toolchain):
    pairs = [(context, continuation) for context in ("", *TEXTS) for continuation in TEXTS]
    instances = requests("loglikelihood", *pairs)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lm = GgufLM.create_from_arg_string(f"gguf={pair.path},float32=True")
    expected = pair.hf.loglikelihood(instances, disable_tqdm=True)
    ours = lm.loglikelihood(instances)
    np.testing.assert_allclose([score for score, _ in ours], [score for score, _ in expected], rtol=1e-5, atol=1e-4)
    assert lm.model.path == pair.path and lm.tokenizer_name == pair.ours.tokenizer_name
    assert list(tmp_path.iterdir()) == [], "the copy outlives the loading"
    lm.model.close()
    mixed = tmp_path / "mixed.gguf"
    command = [program(toolchain, "llama-quantize"), pair.path, mixed, "Q8_0"]  # rows of 40 stay in F16
    subprocess.run(command, env=environment(toolchain), check=True, capture_output=True)
    assert {tensor.type for tensor in read_tensors(mixed).values()} == {"F16", "F32", "Q8_0"}
    with load_float32(mixed, ROOM) as wide, Model(mixed) as narrow:
        assert wide.tokenize("the man").tolist() == narrow.tokenize("the man").tolist()
        scores = [
            [score for score, _ in GgufLM(model, kv_type="F32").loglikelihood(instances)] for model in (wide, narrow)
        ]
    np.testing.assert_allclose(*scores, rtol=0, atol=0.3)  # what Q8_0 is multiplied with is rounded to 8 bits
    monkeypatch.setattr(GGUFWriter, "write_tensor_data", no_space)
    with pytest.raises(SamqError, match=r"float32 copy of .*: No space left on device; set TMPDIR"):
        load_float32(mixed, ROOM)
    assert list(tmp_path.iterdir()) == [mixed]


def no_space(*_arguments, **_settings):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["<bos>"], indirect=True)
def test_samq_lm_eval_knows_the_model_and_the_tasks(pair, tmp_path):
    rows = [{"text": text, "choices": [" an", " the"], "label": 0} for text in TEXTS]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tiny.yaml").write_text(
        f"""
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.json}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
    )
    command = ["lm-eval", "--model", "samq-gguf", "--include_path", tmp_path]
    command += ["--tasks", "tiny,samq_hellaswag", "--limit", "20", "--model_args"]
    done = forked_samq(*command, f"gguf={pair.path}", home=tmp_path)
    assert "|samq_hellaswag|" in done.stdout  # some of its endings do not fit the context
    assert refused(
        done, "the results above are wrong, since requests failed: a continuation is longer than the context"
    )
    instances = requests("loglikelihood", *[(text, choice) for text in TEXTS for choice in (" an", " the")])
    scores = np.array([score for score, _ in pair.ours.loglikelihood(instances)]).reshape(-1, 2)
    (accuracy,) = re.findall(r"\|tiny .*acc +\|↑ +\| *([\d.]+)\|", done.stdout)
    assert float(accuracy) == (scores.argmax(axis=1) == 0).mean()
    done = forked_samq(*command, f"gguf={tmp_path}/none.gguf", home=tmp_path)
    assert refused(done, "none.gguf")


@pytest.fixture(scope="module")
def demo(smollm2_f16):
    """The demo's model in full precision, under hf."""
    network, tokenizer = load_model(describe_source(smollm2_f16), "float32", device="cpu")
    # SmolLM2's own; transformers makes a plain GPT-2 tokenizer of any GGUF's
    own = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(own)
    return HFLM(pretrained=network, tokenizer=tokenizer, batch_size=8)


@pytest.mark.e2e
def test_the_demos_model_scores_as_under_hf(demo, smollm2_f16):
    (task,) = TaskLibrary().open("samq_hellaswag", BenchmarkSettings()).tasks.values()
    task.build_all_requests(limit=30)
    owners = np.array([request.doc_id for request in task.instances])

    def scores(lm):
        return np.array([score for score, _ in lm.loglikelihood(task.instances)])

    def chosen(values):
        return [values[owners == item].argmax() for item in sorted(set(owners))]

    expected = scores(demo)
    # with what llama.cpp rounds to 16 bits by default, activations and cache, and without
    for float32, tolerance in ((False, 0.1), (True, 2e-3)):
        lm = GgufLM(str(smollm2_f16), float32=float32)
        ours = scores(lm)
        lm.model.close()
        np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance)
        assert np.sqrt(np.mean((ours - expected) ** 2)) < tolerance / 4
        assert np.mean(np.equal(chosen(ours), chosen(expected))) >= 0.99


@pytest.mark.e2e
def test_the_demos_tokens_are_those_of_its_hf_tokenizer(demo, smollm2_f16):
    ours, hf = GgufLM(str(smollm2_f16)), demo
    texts = [text for name in ("humaneval", "gsm8k", "hellaswag") for text in load_texts(DatasetSpec(name=name))]
    chat = [{"role": "user", "content": text} for text in texts[:3]]
    for text in [*texts, *TEXTS, ours.apply_chat_template(chat)]:
        assert ours.tok_encode(text) == hf.tok_encode(text), text
    assert ours.apply_chat_template(chat) == hf.apply_chat_template(chat)
    assert (ours.prefix_token_id, ours.eot_token_id) == (hf.prefix_token_id, hf.eot_token_id)
    assert ours.max_length == hf.max_length
    ours.model.close()
