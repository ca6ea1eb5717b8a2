"""The vision part of a multimodal model beside its GGUF."""

import json
import logging

import numpy as np
import pytest

from samq.gguf.file import read_metadata, read_tensors, read_weights
from samq.sensitivity.checkpoint import describe_source
from samq.workspace import Workspace
from tasks.mmproj import convert_mmproj
from tests.published import edit_config, store, tensors_of, tiny_qwen2_5_vl
from tests.tiny_models import save_folder, tiny_llama

pytestmark = pytest.mark.slow  # each test runs llama.cpp's converter


@pytest.fixture
def folder(tmp_path):
    folder = save_folder(tiny_qwen2_5_vl(), tmp_path / "tiny")
    images = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "min_pixels": 784, "max_pixels": 7840}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder


@pytest.fixture
def at(tmp_path, toolchain):
    return Workspace(tmp_path / "store", toolchain, "cpu")


def test_the_vision_part_is_a_file_of_its_own_with_the_checkpoints_values(at, folder, caplog):
    caplog.set_level(logging.INFO, "samq.mmproj")
    path = convert_mmproj(at, describe_source(folder), "F16")
    assert path.name == "mmproj.gguf" and str(path) in caplog.text
    assert read_metadata(path)["clip.has_vision_encoder"] and read_metadata(path)["general.type"] == "mmproj"
    assert not any(name.startswith("blk.") for name in read_tensors(path))
    expected = tensors_of(folder)["visual.blocks.2.mlp.up_proj.weight"].half().numpy()
    assert np.array_equal(read_weights(path, "v.blk.2.ffn_up.weight"), expected.astype(np.float32))


def warning_of(at, folder, caplog):
    assert convert_mmproj(at, describe_source(folder), "F16") is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    return record.getMessage()


def test_a_vision_part_whose_weights_are_missing_is_left_out_with_one_warning(at, folder, caplog):
    store(folder, {name: tensor for name, tensor in tensors_of(folder).items() if not name.startswith("visual.")})
    expected = "the files of tiny have no weights of a vision or audio part; use the text part alone"
    assert warning_of(at, folder, caplog) == f"only the text part of tiny is converted: {expected}"


def test_a_vision_part_without_the_scaling_of_images_is_left_out_with_one_warning(at, folder, caplog):
    (folder / "preprocessor_config.json").unlink()
    expected = "the folder of tiny has no preprocessor_config.json that says how images are scaled; copy it there"
    assert warning_of(at, folder, caplog) == f"only the text part of tiny is converted: {expected}"


def test_a_vision_part_that_the_converter_does_not_know_is_left_out_with_one_warning(at, folder, caplog):
    edit_config(folder, architectures=["Kosmos2ForConditionalGeneration"])
    expected = (
        "llama.cpp's converter does not support the vision or audio part of Kosmos2ForConditionalGeneration (tiny)"
    )
    assert warning_of(at, folder, caplog).startswith(f"only the text part of tiny is converted: {expected}")


def test_a_model_of_text_alone_has_none(at, tmp_path, caplog):
    assert convert_mmproj(at, describe_source(save_folder(tiny_llama(), tmp_path / "text")), "F16") is None
    assert caplog.records == [] and not (at.store / "mmproj").exists()
