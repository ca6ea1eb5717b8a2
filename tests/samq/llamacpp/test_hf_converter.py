"""Folders as they are published, and as transformers 5 saves them, become the GGUF of the same model."""

import json
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from samq.errors import SamqError
from samq.evaluation.divergence import compare_logits
from samq.gguf.file import read_metadata, read_tensors
from samq.llamacpp.hf_converter import completed, partial_rotary_order
from samq.llamacpp.runtime import Model
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.hf_model import load_model
from tests.tiny_models import byte_tokenizer

IDS = np.random.default_rng(0).integers(0, 260, 100).astype(np.int32)
SHAPE = dict(vocab_size=272, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256)
WIDE = SHAPE | dict(intermediate_size=96, num_key_value_heads=2)
LATENT = dict(q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1)
MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1, mamba_expand=2, mamba_chunk_size=16)
LINEAR = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=64,
    linear_value_head_dim=64,
    partial_rotary_factor=0.5,
)
NEMOTRON = dict(mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=1, chunk_size=16, head_dim=16)
HYBRID = dict(
    num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=96, layer_types=["mamba", "attention"]
)

GEMMA = WIDE | dict(head_dim=32, sliding_window=32)
PER_LAYER = dict(
    global_head_dim=64, hidden_size_per_layer_input=16, vocab_size_per_layer_input=272, num_kv_shared_layers=0
)
PHI = dict(original_max_position_embeddings=256, sliding_window=256, attention_bias=True, lm_head_bias=True)
SCALED = dict(
    full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
    sliding_attention=dict(rope_type="default", rope_theta=1e4),
)
KINDS = ["sliding_attention", "full_attention"]
SHARED = dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=32)


def longrope(rotated):
    """Phi's rotary embeddings for texts that are longer than those of its first training; `rotated` values of a head of 16."""
    factors = np.linspace(1, 4, rotated // 2)
    rope = dict(rope_type="longrope", rope_theta=1e4, long_factor=factors.tolist(), short_factor=(factors / 2).tolist())
    rope |= dict(partial_rotary_factor=rotated / 16, original_max_position_embeddings=64)
    return dict(rope_parameters=rope, original_max_position_embeddings=64, pad_token_id=None, sliding_window=256)


# What transformers makes a model of, and what published files say otherwise (None: nothing)
MODELS = {
    "bamba": (WIDE | MAMBA | dict(attn_layer_indices=[1]), {}),
    "deepseek_v3": (WIDE | LATENT | EXPERTS | dict(num_key_value_heads=4, n_group=2, topk_group=1), {}),
    "falcon": (SHAPE | dict(multi_query=True, parallel_attn=True, bias=False), {"num_kv_heads": None}),
    "falcon_groups": (SHAPE | dict(new_decoder_architecture=True, num_kv_heads=2, bias=False), {}),
    "gemma2": (GEMMA | dict(query_pre_attn_scalar=32), {}),
    "gemma3_text": (GEMMA | dict(num_hidden_layers=6, query_pre_attn_scalar=32, rope_parameters=SCALED), {}),
    "gemma4_text": (GEMMA | PER_LAYER | dict(layer_types=KINDS), {}),
    "gpt2": (dict(vocab_size=272, n_positions=256, n_embd=64, n_layer=2, n_head=4), {}),
    "gpt_oss": (WIDE | dict(head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=32), {}),
    "gpt_neox": (SHAPE | dict(intermediate_size=96), {}),
    "granitemoehybrid": (WIDE | MAMBA | HYBRID | dict(position_embedding_type="nope"), {}),
    "mistral": (WIDE | dict(sliding_window=16), {}),
    "hunyuan_v1_moe": (
        WIDE
        | dict(num_experts=4, moe_topk=[2, 2], moe_intermediate_size=[96, 96], num_shared_expert=[1, 1], head_dim=16),
        {},
    ),
    "mixtral": (WIDE | dict(num_local_experts=4, num_experts_per_tok=2, head_dim=32, rope_theta=5e4), {}),
    "mpt": (dict(vocab_size=272, d_model=64, n_layers=2, n_heads=4, max_seq_len=256), {}),
    "nemotron_h": (WIDE | NEMOTRON | dict(num_hidden_layers=3, hybrid_override_pattern="M*-"), {}),
    "phi3": (WIDE | longrope(rotated=16), {}),
    "phi3_partial": (WIDE | longrope(rotated=12) | dict(tie_word_embeddings=True), {}),  # as Phi-4 mini
    "phimoe": (WIDE | PHI | dict(num_local_experts=4, num_experts_per_tok=2), {}),
    "qwen2": (WIDE | dict(use_sliding_window=True, sliding_window=16, max_window_layers=0), {}),
    "qwen2_moe": (WIDE | SHARED, {}),
    "qwen3_5_text": (WIDE | LINEAR | dict(num_hidden_layers=4, head_dim=64), {"mtp_num_hidden_layers": 1}),
    "stablelm": (WIDE | dict(qk_layernorm=True, use_parallel_residual=True), {}),
}


# Those that transformers reads from a GGUF and that need help there; `test_gguf_config.py` has more
FROM_GGUF = (
    *(
        "falcon",
        "falcon_groups",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "mixtral",
        "phi3",
        "phi3_partial",
        "qwen2_moe",
    ),
    "stablelm",
)

# One process for all, since gguf's package of the converter and of these tests are two.
CONVERT_ALL = """
import runpy, sys
from pathlib import Path
from samq.llamacpp.hf_converter import mend
converter, *folders = map(Path, sys.argv[1:])
mend(converter)
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"  # llama.cpp does not know the tests' tokenizer
main = runpy.run_path(str(converter), run_name="converter")["main"]
for folder in folders:
    sys.argv = ["converter", str(folder), "--outfile", str(folder / "model.gguf"), "--outtype", "f32"]
    main()
"""


@pytest.fixture(scope="module")
def models(toolchain, tmp_path_factory):
    """Name -> (torch's model, folder that has its GGUF, too)."""
    root = tmp_path_factory.mktemp("models")
    # without a folder "phi3": by that name of a model, llama.cpp looks for published tokens (src/llama-vocab.cpp)
    folders = {kind: root / kind.replace("phi3", "phi") for kind in MODELS}
    networks = {kind: random_model(kind, config) for kind, (config, _) in MODELS.items()}
    for kind, model in networks.items():
        save(model, folders[kind], MODELS[kind][1])
    command = [sys.executable, "-c", CONVERT_ALL, toolchain.converter, *folders.values()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {kind: (networks[kind], folders[kind]) for kind in MODELS}


def random_model(kind, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind.removesuffix("_groups").removesuffix("_partial"), **config)
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "conv" not in name:
                parameter.normal_(std=0.05 if kind.startswith("gemma") else 0.15)  # ggml's GELU is a table in F16
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def save(model, folder, changed):
    """As transformers saves it, with other values in the configuration; None takes a key away."""
    model.save_pretrained(folder)
    kind = model.config.model_type
    tokenizer = pieces_tokenizer() if kind.startswith(("gemma", "phi3")) else byte_tokenizer()
    tokenizer.save_pretrained(folder)
    if kind in ("gemma2", "gemma3_text", "phi3", "phimoe"):
        write_sentencepiece(folder / "tokenizer.model")
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changed
    file.write_text(
        json.dumps({key: value for key, value in config.items() if value is not None or key not in changed})
    )


def pieces_tokenizer():
    """Gemma's kind: all bytes as pieces, and a few letters."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces = [
        *special,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        *"aehnt",
        "th",
        "the",
        "an",
        "at",
        "ha",
        "ta",
    ]
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("a", "t"), ("h", "a"), ("t", "a")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        tokenizer_models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def write_sentencepiece(path):
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the hat than that ant ate at tea", "an ant ate the tan hat"]),
            model_writer=file,
            model_type="bpe",
            vocab_size=len(pieces_tokenizer()),
            byte_fallback=True,
            **dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2),
        )


def median_divergence(path, model):
    with Model(path) as opened, opened.context(len(IDS), kv_type="F32") as context:
        logits = context.decode(IDS, np.arange(len(IDS)), 0, np.ones(len(IDS), bool)).copy()
    with torch.no_grad():
        ours = model(torch.tensor(IDS[None].astype(np.int64)), use_cache=False).logits[0].numpy()
    return compare_logits(logits, ours[:, : logits.shape[1]], IDS)["kld"].median()


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_computes_what_torch_does(models, kind):
    _, folder = models[kind]
    model, _ = load_model(describe_source(folder), device="cpu")
    assert median_divergence(folder / "model.gguf", model) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind in FROM_GGUF])
def test_the_torch_model_of_the_gguf_is_llama_cpps(models, kind):
    path = models[kind][1] / "model.gguf"
    model, _ = load_model(describe_source(path), device="cpu")
    assert median_divergence(path, model) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "architecture"), [("gpt2", "gpt2"), ("gpt_oss", "gpt-oss")])
def test_a_gguf_that_transformers_cannot_read_is_refused_with_the_way_out(models, kind, architecture):
    way_out = (
        r"give the model's Hugging Face folder or hub id as the model instead \(`samq compensate`: --model\); cause: "
    )
    with pytest.raises(SamqError, match=f"from a GGUF of the architecture {architecture}; {way_out}") as refused:
        load_model(describe_source(models[kind][1] / "model.gguf"), device="cpu")
    assert len(str(refused.value)) < 400


@pytest.mark.slow
def test_a_falcon_has_one_key_and_value_head(models):
    path = models["falcon"][1] / "model.gguf"
    assert read_metadata(path)["falcon.attention.head_count_kv"] == 1
    assert read_tensors(path)["blk.0.attn_qkv.weight"].shape == (64 + 2 * 16, 64)


def test_an_answer_of_the_published_file_stays():
    assert completed({"model_type": "deepseek_v3", "scoring_func": "softmax"})["scoring_func"] == "softmax"
    neox = {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    assert completed(neox)["rotary_pct"] == 0.5


@pytest.mark.parametrize("config", [{"model_type": "llama", "pad_token_id": None}, {"model_type": "bamba"}, {}])
def test_a_configuration_that_needs_nothing_or_is_of_another_time_stays_as_it_is(config):
    assert completed(config) == config


def test_only_rotated_rows_are_interleaved():
    assert partial_rotary_order(16, head=8, rotated=4) == [0, 2, 1, 3, 4, 5, 6, 7, 8, 10, 9, 11, 12, 13, 14, 15]
    assert partial_rotary_order(8, head=4, rotated=4) == [0, 2, 1, 3, 4, 6, 5, 7]
