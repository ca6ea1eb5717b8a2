"""Llamas with random weights on disk, of the shapes that large_model.py measures."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

SHAPES = {  # width, feed-forward width, heads, key-value heads, blocks, vocabulary
    "tiny": (256, 704, 4, 2, 4, 512),
    "0.5b": (1280, 3456, 20, 4, 24, 32000),
    "1b": (2048, 5632, 16, 4, 24, 32768),
    "2b": (2560, 6912, 20, 4, 24, 49152),
    "8b": (4096, 14336, 32, 8, 32, 128256),
    "70b": (8192, 28672, 64, 8, 80, 128256),
}
SEED = 1


def write_model(folder: Path, shape: tuple[int, ...], blocks: int, device: str) -> None:
    """Write config.json, tokenizer and weights in bf16, a file a block; the weights are drawn on the device."""
    width, inner, heads, kv_heads, _, vocabulary = shape
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=blocks,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    files: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in skeleton.named_parameters():
        block = re.search(r"layers\.(\d+)\.", name)
        files.setdefault(block_file(int(block[1])) if block else "ends.safetensors", {})[name] = parameter.shape
    generator = torch.Generator(device).manual_seed(SEED)
    index, total = {}, 0
    for file, shapes in files.items():
        tensors = _random(shapes, generator)
        index |= dict.fromkeys(tensors, file)
        total += sum(values.nbytes for values in tensors.values())
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )


def block_file(number: int) -> str:
    """The name of a block's file."""
    return f"block-{number:03}.safetensors"


def _random(shapes: Mapping[str, torch.Size], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Matrices of normal values, which keep the size of what goes through them, and vectors of ones."""
    tensors = {}
    for name, size in shapes.items():
        scale = 0.5 / size[-1] ** 0.5 if len(size) > 1 else 0
        values = torch.empty(size, dtype=torch.bfloat16, device=generator.device)
        values.normal_(0, max(scale, 1e-9), generator=generator)
        tensors[name] = (values if len(size) > 1 else torch.ones_like(values)).cpu()
    return tensors
