"""Tiny causal LMs, a tokenizer and token batches, made on the spot."""

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PreTrainedTokenizerFast

from samq.data.tokens import TokenBatch
from samq.gguf.file import gguf_names
from samq.sensitivity.views import rotary_row_order

VOCABULARY = 64
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,  # the default makes all logits alike
    pad_token_id=None,  # torch gives the padding token's embedding no gradient
)


def tiny_llama(tied=False, seed=0, **shape):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE | shape, tie_word_embeddings=tied)).eval()


def tiny_llama_that_ends(token, **shape):
    """A Llama whose next token is always this one."""
    network = tiny_llama(**shape)
    with torch.no_grad():
        for layer in network.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        network.model.embed_tokens.weight[:, 0] = 4
        network.lm_head.weight[:, 0] = 0
        network.lm_head.weight[token] = 0
        network.lm_head.weight[token, 0] = 6
    return network


def tiny_mixtral(seed=0, **changes):
    torch.manual_seed(seed)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = MixtralConfig(**SHAPE | experts | changes, tie_word_embeddings=False)
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


def byte_tokenizer(bos=None, chat_template=None, eos="<eos>"):
    """GPT-2's pre-tokenizer over bytes, a few merges, and EOS; with `bos`, such a token before every text."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "an", "th", "the", eos] + ([bos] if bos else [])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "n"), ("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        special = [(bos, vocabulary[bos])]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=chat_template
    )


def save_folder(model, folder, **arguments):
    model.save_pretrained(folder, **arguments)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_llama_gguf(model, path, permute=True, tokenizer=None, more=lambda writer: None, **vocabulary):
    """The F16 GGUF that llama.cpp's converter makes of a Llama; of a tokenizer only if it is a `byte_tokenizer`.

    `more` adds metadata and tensors, and `vocabulary` is for `add_byte_tokenizer`.
    """
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
    if tokenizer is not None:
        add_byte_tokenizer(writer, tokenizer, config.vocab_size, **vocabulary)
    names = names_of(model)
    for hf_name, parameter in model.named_parameters():
        name, values = names(hf_name), parameter.detach().numpy()
        heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(name.split(".")[-2][5:])
        if permute and heads:
            values = values[rotary_row_order(len(values), heads)]
        writer.add_tensor(name, values.astype(np.float16 if values.ndim > 1 else np.float32))
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_byte_tokenizer(writer, tokenizer, vocab_size, pre="gpt-2", normal=(), add_eos=False):
    """With llama.cpp's name of the pre-tokenizer, special tokens that the file calls `normal`, and EOS after every text."""
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    pieces += [f"<unused{number}>" for number in range(vocab_size - len(pieces))]
    control = {*tokenizer.all_special_tokens, *pieces[len(tokenizer) :]} - set(normal)
    kinds = [gguf.TokenType.CONTROL if piece in control else gguf.TokenType.NORMAL for piece in pieces]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(pieces)
    writer.add_token_types(kinds)
    writer.add_token_merges(["a n", "t h", "th e"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(tokenizer.bos_token is not None)
    if add_eos:
        writer.add_add_eos_token(True)
    if tokenizer.bos_token is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def write_mamba_gguf(path, tokenizer, vocab_size):
    """A recurrent model of one block with random weights."""
    width, inner, state, rank, kernel = 16, 32, 4, 2, 4
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(1)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_layer_norm_rms_eps(1e-5)
    add_byte_tokenizer(writer, tokenizer, vocab_size)
    for name, shape in {
        "token_embd.weight": (vocab_size, width),
        "output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.ssm_in.weight": (2 * inner, width),
        "blk.0.ssm_conv1d.weight": (inner, kernel),
        "blk.0.ssm_conv1d.bias": (inner,),
        "blk.0.ssm_x.weight": (rank + 2 * state, inner),
        "blk.0.ssm_dt.weight": (inner, rank),
        "blk.0.ssm_dt.bias": (inner,),
        "blk.0.ssm_a": (inner, state),
        "blk.0.ssm_d": (inner,),
        "blk.0.ssm_out.weight": (width, inner),
    }.items():
        values = random.normal(0, 0.5, shape).astype(np.float32)
        writer.add_tensor(name, -np.abs(values) if name.endswith("ssm_a") else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
