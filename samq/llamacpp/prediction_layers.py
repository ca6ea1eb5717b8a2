"""Layers that predict further tokens (MTP, nextn): how many a model has, and how many of them its GGUF keeps.

This imports no `gguf`, since llama.cpp's converter imports it and has a package `gguf` of its own.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from samq.safetensors_header import read_safetensors_header

_LAYER_OF = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")
_OF_PREDICTION = re.compile(r"(?:^|\.)mtp\w*\.(?:layers\.)?(\d+)\.")  # mtp.layers.0, model.mtp_block.0
_OTHER_PART = re.compile(r"vision|visual|audio|talker")
_KEY = re.compile(r"(?=.*(?:^|_)(?:mtp|nextn)(?:_|$))(?=.*(?:^|_)(?:num|n|layers|modules)(?:_|$))")
_IN_GGUF = re.compile(r"blk\.(\d+)\.nextn\.")


def count_in_config(config: Mapping[str, Any]) -> int:
    """How many layers of prediction a configuration names. Families have keys of their own; parts may have others' keys."""
    return max((value for key, value in _entries(config) if _KEY.search(key) and type(value) is int), default=0)


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from () if _OTHER_PART.search(key) else _entries(value)
        else:
            yield key, value


def count_in_weights(names: Iterable[str], layers: int) -> int:
    """How many layers of prediction some weights are of: those named so, and those beyond the model's own `layers`."""
    text = [name for name in names if not _OTHER_PART.search(name)]
    named = [name for name in text if "mtp" in name]
    unnamed = [name for name in text if "mtp" not in name]
    beyond = {layer for name in unnamed for layer in _LAYER_OF.findall(name) if int(layer) >= layers}
    return len(beyond) or max(bool(named), len({layer for name in named for layer in _OF_PREDICTION.findall(name)}))


def count_in_gguf(names: Iterable[str]) -> int:
    """How many blocks of the GGUF with these tensors predict further tokens."""
    return len({block for name in names for block in _IN_GGUF.findall(name)})


def weight_names(folder: Path) -> list[str]:
    """Names of the tensors in a folder's safetensors; empty if it has none."""
    return [name for path in sorted(folder.glob("*.safetensors")) for name in read_safetensors_header(path)[1]]


def left_out(folder: Path, tensors: Iterable[str], is_converted: bool) -> str | None:
    """What a GGUF with these tensors lacks of the layers of prediction that a model's folder has, and why; None if nothing.

    `is_converted` says whether llama.cpp's converter made the GGUF from this folder.
    """
    config = json.loads((folder / "config.json").read_text())
    layers = (config.get("text_config") or config).get("num_hidden_layers")
    names = weight_names(folder)
    stored = count_in_weights(names, layers) if isinstance(layers, int) else 0
    named, kept = count_in_config(config), count_in_gguf(tensors)
    if kept >= max(stored, min(named, 1)):
        return None
    if not is_converted:
        reason = "the GGUF that was given does not have them"
    elif names and not stored:
        reason = "its files have no weights of them"
    else:
        reason = f"llama.cpp's converter does not keep them for {(config.get('architectures') or ['this model'])[0]}"
    missing = (stored or named) - kept
    return f"lacks {missing} layer{'s' if missing > 1 else ''} for multi-token prediction (MTP): {reason}"
