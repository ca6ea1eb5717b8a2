"""What llama.cpp cannot load is said right after the conversion."""

import json

import pytest

from samq.errors import SamqError
from samq.llamacpp.runtime import LoadError
from samq.sensitivity.checkpoint import describe_source
from samq.workspace import Workspace
from tasks.convert import convert
from tests.architectures.models import write_model
from tests.conftest import write_tiny_gguf


@pytest.fixture
def at(tmp_path, toolchain):
    return Workspace(tmp_path / "store", toolchain, device="cpu", timeout_s=60.0)


@pytest.fixture
def folder(tmp_path):
    return write_model("Gemma", tmp_path / "tiny")


@pytest.mark.slow
def test_a_folder_whose_configuration_names_more_layers_than_its_weights_is_refused(at, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": config["num_hidden_layers"] + 1}))
    reason = r"tensor 'blk\.2\.attn_norm\.weight' not found; compare config.json with the published"
    with pytest.raises(SamqError, match=f"cannot load what its converter made of tiny: .*{reason}"):
        convert(at, describe_source(folder), "F16")


def test_a_gguf_that_llama_cpp_cannot_load_is_refused_with_its_reason(at, tmp_path):
    path = write_tiny_gguf(tmp_path / "odd.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"abaca"))
    with pytest.raises(LoadError, match="unknown model architecture: 'abaca'; convert the model again, or choose"):
        convert(at, describe_source(path), "F16")
