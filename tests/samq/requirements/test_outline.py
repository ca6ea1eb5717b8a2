import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from samq.allocation.target import OpenTarget, stock_plan
from samq.errors import SamqError
from samq.gguf.file import HashedFile, read_tensors
from samq.llamacpp.convert import convert
from samq.llamacpp.process import run
from samq.llamacpp.toolchain import environment, program
from samq.records import ModelSource
from samq.requirements.outline import read_outline, write_even_importance
from tests.architectures.models import write_model
from tests.conftest import write_tiny_gguf
from tests.samq.requirements.conftest import COMMIT, LLAMA_70B
from tests.tiny_models import VOCABULARY, save_folder, tiny_llama, tiny_mixtral, write_llama_gguf

WIDE = dict(hidden_size=256, intermediate_size=512)


def contents(path):
    return {name: (tensor.shape, tensor.type) for name, tensor in read_tensors(path).items()}


@pytest.mark.parametrize("tied", [False, True])
def test_a_folders_outline_has_the_tensors_of_its_gguf(tmp_path, tied):
    model = tiny_llama(tied, **WIDE)
    outline = read_outline(str(save_folder(model, tmp_path / "model")), None, "F16", tmp_path)
    converted = write_llama_gguf(model, tmp_path / "f16.gguf")
    assert contents(outline.gguf) == contents(converted)
    assert outline.bytes == sum(tensor.bytes for tensor in read_tensors(converted).values())
    assert (outline.source_bytes, outline.download_bytes, outline.is_gguf) == (
        (tmp_path / "model" / "model.safetensors").stat().st_size, 0, False,
    )  # fmt: skip
    assert (outline.vocabulary, outline.width, len(outline.blocks)) == (VOCABULARY, 256, 2)
    assert outline.weights == sum(parameter.numel() for parameter in model.parameters())
    in_blocks = sum(p.numel() for layer in model.model.layers for p in layer.parameters())
    matrices = sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.ndim > 1)
    assert (outline.weights_in_blocks, outline.active_weights) == (in_blocks, matrices + VOCABULARY * 256)


@pytest.mark.parametrize("mixture", ["Q3_K_M", "Q4_K_M", "IQ2_XS"])
def test_llama_quantize_gives_a_folders_outline_the_types_of_the_model(tmp_path, toolchain, mixture):
    model = tiny_llama(**WIDE)
    outline = read_outline(str(save_folder(model, tmp_path / "model")), None, "F16", tmp_path)
    matrix = HashedFile(write_even_importance(outline, tmp_path), "matrix")
    plans = [
        stock_plan(OpenTarget.open(HashedFile(path, "full"), toolchain, matrix), mixture)
        for path in (outline.gguf, write_llama_gguf(model, tmp_path / "f16.gguf"))
    ]
    assert plans[0].types == plans[1].types
    assert plans[0].tensor_bytes == plans[1].tensor_bytes


def test_the_outline_of_a_quantized_gguf_is_what_it_is_converted_to(tmp_path, toolchain):
    quantized = write_tiny_gguf(tmp_path / "tiny.gguf")
    plain = read_outline(str(quantized), None, "BF16", tmp_path)
    assert (plain.gguf, plain.is_full_gguf, plain.is_gguf) == (quantized, True, True)
    run(
        [program(toolchain, "llama-quantize"), quantized, tmp_path / "q8.gguf", "Q8_0"],
        log=tmp_path / "log", timeout_s=60, env=environment(toolchain),
    )  # fmt: skip
    outline = read_outline(str(tmp_path / "q8.gguf"), None, "F16", tmp_path)
    assert not outline.is_full_gguf
    (tmp_path / "converted").mkdir()
    source = ModelSource(name="q8", weights_digest="", tokenizer_digest="", gguf=tmp_path / "q8.gguf")
    converted = convert(source, tmp_path / "converted", toolchain, precision="F16")
    assert contents(outline.gguf) == contents(converted)


@pytest.mark.parametrize(
    "name", ["Mixtral", "Hunyuan MoE", "gpt-oss in MXFP4", "Gemma 3, multimodal", "Mamba", "GPT-2"]
)
def test_the_weights_of_other_architectures_are_quantized_too(tmp_path, toolchain, name):
    outline = read_outline(str(write_model(name, tmp_path / "model")), None, "BF16", tmp_path)
    matrix = HashedFile(write_even_importance(outline, tmp_path), "matrix")
    target = OpenTarget.open(HashedFile(outline.gguf, "full"), toolchain, matrix)
    assert len(outline.blocks) == 2
    assert (
        sum(tensor.weights for tensor in target.quantizable.values()) > 0.95 * outline.weights
    )  # but for positions and norms
    assert 4.5 < stock_plan(target, "Q4_K_M").bits_per_weight < 6


def test_of_a_mixture_of_experts_a_token_enters_some(tmp_path):
    model = tiny_mixtral()
    outline = read_outline(str(save_folder(model, tmp_path / "model")), None, "F16", tmp_path)
    assert outline.used_experts == 2 / 4
    assert outline.weights == sum(parameter.numel() for parameter in model.parameters())
    stacked = sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.ndim == 3)
    others = sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.ndim == 2)
    assert outline.active_weights == stacked / 2 + others + VOCABULARY * 32


def test_a_model_of_the_hub_is_known_by_its_configuration_and_takes_no_disk(outline_of):
    outline = outline_of("llama-70b", **LLAMA_70B)
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(
            LlamaConfig(num_key_value_heads=8, vocab_size=128256, **LLAMA_70B)
        ).num_parameters()
    assert outline.weights == weights == 70_553_706_496
    assert outline.download_bytes == outline.bytes == 141_110_050_816
    assert outline.gguf.stat().st_size > outline.bytes
    assert outline.gguf.stat().st_blocks * 512 < 10**6


def test_a_model_of_the_hub_whose_weights_are_here_need_not_come(hub_model, tmp_path):
    model = tiny_llama()
    name = hub_model("tiny")
    save_folder(model, tmp_path / "hub" / "models--someone--tiny" / "snapshots" / COMMIT)
    outline = read_outline(name, "main", "F16", tmp_path)
    assert outline.download_bytes == 0 < outline.source_bytes


def test_a_model_that_is_not_here_is_one_sentence(hub_model, tmp_path):
    hub_model("there", num_hidden_layers=2)
    with pytest.raises(SamqError, match=r"someone/else is not on this machine.*`hf download someone/else config.json`"):
        read_outline("someone/else", None, "F16", tmp_path)
    with pytest.raises(SamqError, match=r"config.json --revision v2`"):
        read_outline("someone/there", "v2", "F16", tmp_path)
    with pytest.raises(SamqError, match="there is no package nothing"):
        read_outline("package:nothing/x.gguf", None, "F16", tmp_path)
    with pytest.raises(SamqError, match="there is no GGUF file at"):
        read_outline(str(tmp_path / "x.gguf"), None, "F16", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SamqError, match="has no weights"):
        read_outline(str(tmp_path / "empty"), None, "F16", tmp_path)
    save_folder(tiny_llama(), tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(SamqError, match="transformers does not know the model in"):
        read_outline(str(tmp_path / "odd"), None, "F16", tmp_path)
