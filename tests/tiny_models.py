"""Tiny causal LMs, a tokenizer and token batches, made on the spot."""

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast

from samq.calibration import TokenBatch
from samq.gguf_file import gguf_names
from samq.layout import rotary_row_order

VOCABULARY = 64
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=40,  # not a multiple of the fisher's block
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,  # the default makes all logits alike
    pad_token_id=None,  # torch gives the padding token's embedding no gradient
)


def tiny_llama(tied=False, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, tie_word_embeddings=tied)).eval()


def tiny_mixtral(seed=0):
    torch.manual_seed(seed)
    config = MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config).eval()


def names_of(model, architecture="llama"):
    blocks = model.config.num_hidden_layers
    return gguf_names({"general.architecture": architecture, f"{architecture}.block_count": blocks})


def random_tokens(lengths=(12, 5, 9, 2, 12), seed=0):
    random = np.random.default_rng(seed)
    return TokenBatch.of([random.integers(0, VOCABULARY, length).tolist() for length in lengths])


def tiny_tokenizer(bos=True):
    """One token a word: w0, w1, ..."""
    vocabulary = {"<s>": 0, **{f"w{number}": number for number in range(1, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def save_folder(model, folder, **arguments):
    model.save_pretrained(folder, **arguments)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_llama_gguf(model, path, permute=True):
    """The F16 GGUF that llama.cpp's converter makes of a Llama, less the tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = names_of(model)
    for hf_name, parameter in model.named_parameters():
        name, values = names(hf_name), parameter.detach().numpy()
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(name.split(".")[-2][5:])
        if permute and heads:
            values = values[rotary_row_order(len(values), heads)]
        writer.add_tensor(name, values.astype(np.float16 if values.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
