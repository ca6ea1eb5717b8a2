"""`samq calibrate` and `samq imatrix`."""

import json

import pytest

from samq.cli.options import CALIBRATION_SAMPLES
from samq.gguf.file import file_sha256, read_metadata
from samq.records import Plan, SensitivityMap
from tests.command_line import refused
from tests.samq.cli.conftest import save_map
from tests.tiny_models import byte_tokenizer, save_folder, tiny_llama


@pytest.fixture
def model(tmp_path):
    return save_folder(tiny_llama(), tmp_path / "model")


def edit_config(model, **fields):
    config = model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))


def give_unknown_tokenizer(model):
    byte_tokenizer().save_pretrained(model)
    edit_config(model, vocab_size=512)


def converting(spoil, message):
    """What llama.cpp's converter refuses, which takes four seconds to start."""
    return pytest.param(spoil, message, marks=pytest.mark.slow)


def cut_short(model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: (model / "config.json").unlink(), "model is not a model folder: it has no config.json"),
        (
            lambda model: edit_config(model, architectures=["BertForMaskedLM"]),
            "model is a BertForMaskedLM, not a causal",
        ),
        converting(
            lambda model: edit_config(model, architectures=["CTRLLMHeadModel"], model_type="ctrl"),
            "llama.cpp's converter does not support CTRLLMHeadModel (model)",
        ),
        converting(
            give_unknown_tokenizer,
            "llama.cpp's converter does not know the tokenizer of model; convert the model with a llama.cpp",
        ),
        converting(
            lambda model: byte_tokenizer().save_pretrained(model),
            "the tokenizer of model has tokens that its embedding has no row for (vocab_size in config.json); resize",
        ),
        converting(
            lambda model: edit_config(model, architectures=["DbrxForCausalLM"]),
            "llama.cpp's converter does not find ffn_config in the configuration of model; add it to config.json, or,",
        ),
        (cut_short, "model.safetensors has 74316 bytes where its header promises 74416"),
        (lambda model: None, "has no field 'text'; name some of its fields: body"),
    ],
    ids=[
        "no config",
        "unknown to transformers",
        "unknown to llama.cpp",
        "unknown tokenizer",
        "more tokens than rows",
        "a key that the configuration lacks",
        "truncated safetensors",
        "no such field",
    ],
)
def test_what_cannot_be_calibrated_is_refused(samq, tmp_path, model, spoil, message):
    spoil(model)
    field = "text" if "field" in message else "body"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": f"w1 w2 w{number}"}) + "\n" for number in range(4)))
    arguments = ("calibrate", model, "--dataset", rows, "--field", field, "--samples", 4, "--out", tmp_path / "m.json")
    assert refused(samq(*arguments), message)
    assert not (tmp_path / "m.json").exists()


def test_a_truncated_gguf_is_not_calibrated(samq, tmp_path, cut_gguf):
    done = samq("calibrate", cut_gguf, "--out", tmp_path / "m.json")
    assert refused(done, "cut.gguf is not a whole GGUF file")


def test_values_that_calibrate_cannot_use_are_refused(samq, tmp_path, gguf):
    command = ("calibrate", gguf, "--out", tmp_path / "out")
    seeded = samq(*command, "--seed", "-1")
    assert seeded.returncode == 2 and "'--seed'" in seeded.stderr
    assert refused(samq(*command, "--dataset", ""), "invalid name '': String should have at least 1 character")


def test_a_plain_text_file_is_calibrated_on_with_progress(samq, terminal, tmp_path, speaking_gguf):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {number} of one document\n\n" for number in range(150)))
    calibrate = ("calibrate", speaking_gguf, "--dataset", text, "--sequence-tokens", 64, "--out", tmp_path / "map.json")
    done = samq(*calibrate)
    assert done.returncode == 0, done.stderr
    assert "highest scores of " in done.stderr
    for what in ("load Python packages", f"read {text}", f"tokenize {text}", "load full", "compare full with its GGUF"):
        assert what in terminal.getvalue(), "the terminal shows long work"
    assert SensitivityMap.load(tmp_path / "map.json").sequence_tokens == (63,) * CALIBRATION_SAMPLES
    assert (tmp_path / "map.fisher.safetensors").is_file()
    done = samq(*calibrate, "--samples", 1000)
    assert refused(done, "sequences of 64 tokens, too few for 1000; ask for fewer or shorter ones")


def test_an_importance_matrix_is_made_and_used(samq, terminal, tmp_path, speaking_gguf):
    text, matrix = tmp_path / "text.txt", tmp_path / "matrix.gguf"
    text.write_text("the man ran and ran\n" * 40)
    arguments = ("imatrix", "--gguf", speaking_gguf, "--dataset", text, "--sequence-tokens", 64, "--out", matrix)
    done = samq(*arguments)
    assert done.returncode == 0, done.stderr
    for what in ("load Python packages", f"read {text}", "open full.gguf"):
        assert what in terminal.getvalue()
    assert read_metadata(matrix)["general.type"] == "imatrix"
    sensitivity = save_map(tmp_path / "map.json", speaking_gguf, lambda number, count: number / count)
    plan = ("plan", "--map", sensitivity, "--gguf", speaking_gguf, "--imatrix", matrix, "--out", tmp_path / "p.json")
    assert samq(*plan).returncode == 0
    assert Plan.load(tmp_path / "p.json").imatrix_sha256 == file_sha256(matrix)
    text.write_text("the man")
    assert refused(samq(*arguments), "you need at least 128 tokens for a context of 64")
