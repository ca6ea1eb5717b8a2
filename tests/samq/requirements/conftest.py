import pytest
from huggingface_hub import constants
from transformers import LlamaConfig

COMMIT = "0" * 40
LLAMA_8B = dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=32)
LLAMA_70B = dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_hidden_layers=80)


@pytest.fixture
def hub_model(tmp_path, monkeypatch):
    """Put the configuration of a Llama, and no weights, into a cache of the hub; gives its id."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(name, **shape):
        repository = tmp_path / "hub" / f"models--someone--{name}"
        config = LlamaConfig(num_key_value_heads=8, vocab_size=128256, architectures=["LlamaForCausalLM"], **shape)
        config.save_pretrained(repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        return f"someone/{name}"

    return add


@pytest.fixture
def outline_of(hub_model, tmp_path):
    """The outline of a Llama that is not on this machine, by its shape."""
    from samq.requirements.outline import read_outline

    def outline(name, **shape):
        work = tmp_path / name
        work.mkdir()
        return read_outline(hub_model(name, **shape), None, "BF16", work)

    return outline
