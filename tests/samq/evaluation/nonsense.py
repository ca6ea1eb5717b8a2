"""A model that computes nonsense after one token, as a damaged or badly quantized file does."""

from samq.llamacpp.runtime import Model
from tests.tiny_models import byte_tokenizer, tiny_llama, write_llama_gguf


def nonsense_after(token, folder, **shape):
    """A tiny model, open, whose logits are NaN as soon as a text has this token; without one (None): always."""
    network = tiny_llama(vocab_size=264, **shape)
    if token is None:
        network.lm_head.weight.data[3] = float("nan")
    else:
        network.model.embed_tokens.weight.data[token] = float("nan")
    return Model(write_llama_gguf(network, folder / "nonsense.gguf", tokenizer=byte_tokenizer()))
