"""The text part of multimodal checkpoints, with the tensor names and nested configurations that are published."""

import json

import pytest
import torch

from samq.errors import SamqError
from samq.gguf.file import gguf_names
from samq.sensitivity.checkpoint import describe_source, is_multimodal
from samq.sensitivity.hf_model import load_model
from tests.published import edit_config, store, tensors_of, tiny_gemma3, tiny_mistral3, tiny_qwen2_5_vl
from tests.tiny_models import save_folder, tiny_llama, write_llama_gguf

MODELS = {
    "gemma3": (tiny_gemma3, "language_model.model.layers.1.mlp.up_proj.weight"),
    "llama": (tiny_mistral3, "language_model.model.layers.1.mlp.up_proj.weight"),  # a Mistral is one to llama.cpp
    "qwen2vl": (tiny_qwen2_5_vl, "model.layers.1.mlp.up_proj.weight"),
}


def token_ids(length=9):
    return torch.arange(1, 1 + length)[None]


@pytest.mark.parametrize("architecture", MODELS)
def test_the_text_part_is_loaded_and_predicts_as_the_whole_does(tmp_path, architecture):
    make, published = MODELS[architecture]
    folder = save_folder(make(), tmp_path / "tiny")
    assert published in tensors_of(folder)
    source = describe_source(folder)
    assert is_multimodal(source)
    model, _ = load_model(source, device="cpu")
    passed = dict(input_ids=token_ids(), attention_mask=torch.ones_like(token_ids()), use_cache=False)
    with torch.no_grad():
        assert torch.equal(model(**passed).logits, make()(**passed).logits)
    assert torch.equal(model.get_input_embeddings().weight, make().get_input_embeddings().weight)
    assert model.get_output_embeddings().weight.shape == model.get_input_embeddings().weight.shape


@pytest.mark.parametrize("architecture", MODELS)
def test_only_the_text_part_stays_and_all_of_it_has_a_name_in_the_gguf(tmp_path, architecture):
    model, _ = load_model(describe_source(save_folder(MODELS[architecture][0](), tmp_path / "tiny")), device="cpu")
    name_of = gguf_names({"general.architecture": architecture, f"{architecture}.block_count": 2})
    names = {name: name_of(name) for name, _ in model.named_parameters()}
    assert None not in names.values() and len({*names.values()}) == len(names)
    assert not any("vis" in name or "projector" in name for name in names)
    assert names["model.language_model.layers.1.mlp.up_proj.weight"] == "blk.1.ffn_up.weight"
    assert names["model.language_model.embed_tokens.weight"] == "token_embd.weight"


def test_a_text_part_without_its_vision_part_is_whole(tmp_path):
    """As fine-tuned models are often published; a text weight that is missing is named all the same."""
    folder = save_folder(tiny_mistral3(), tmp_path / "tiny")
    text = {name: tensor for name, tensor in tensors_of(folder).items() if name.startswith("language_model.")}
    store(folder, text)
    load_model(describe_source(folder), device="cpu")
    del text["language_model.model.norm.weight"]
    store(folder, text)
    with pytest.raises(
        SamqError, match=r"tiny has no weights for model\.language_model\.norm\.weight; download it again"
    ):
        load_model(describe_source(folder), device="cpu")


def test_embeddings_are_tied_as_the_files_say_where_the_configuration_of_the_whole_is_silent(tmp_path):
    """Mistral Small 3.1 has a `lm_head`, and a configuration whose default would tie it."""
    folder = save_folder(tiny_mistral3(), tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load_model(describe_source(folder), device="cpu")
    assert torch.equal(model.get_output_embeddings().weight, tensors_of(folder)["language_model.lm_head.weight"])
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight


def test_the_preprocessor_of_images_is_part_of_a_models_identity(tmp_path):
    folder = save_folder(tiny_mistral3(), tmp_path / "tiny")
    before = describe_source(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    assert describe_source(folder).digest() != before.digest()


def test_a_gguf_of_the_text_part_loads_with_the_folder_of_the_whole(tmp_path):
    folder = save_folder(tiny_llama(), tmp_path / "tiny")
    text = {**json.loads((folder / "config.json").read_text()), "model_type": "llama"}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16}
    edit_config(
        folder,
        model_type="llava",
        architectures=["LlavaForConditionalGeneration"],
        text_config=text,
        vision_config=vision,
        image_token_index=63,
    )
    source = describe_source(write_llama_gguf(tiny_llama(), tmp_path / "tiny-f16.gguf"), hf_folder=folder)
    assert not is_multimodal(source), "a GGUF holds the text part alone"
    model, _ = load_model(source, device="cpu")
    for name, weight in tiny_llama().named_parameters():
        expected = weight.half().float() if weight.ndim > 1 else weight
        assert torch.equal(dict(model.named_parameters())[name], expected)


def test_a_model_of_text_alone_is_not_multimodal(tmp_path):
    source = describe_source(save_folder(tiny_llama(), tmp_path / "tiny"))
    assert not is_multimodal(source)
