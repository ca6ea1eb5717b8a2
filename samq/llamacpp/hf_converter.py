"""llama.cpp's converter of Hugging Face folders, with what it misses of a configuration and some of its faults mended.

`python -m samq.llamacpp.hf_converter CONVERTER ARGUMENT...` runs the converter with these arguments. It asks transformers
for the configuration. Transformers 5 renames keys of published files, leaves others out, and writes its own names when a
fine-tuned model is saved. The converter knows the published keys only.
"""

import importlib
import json
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

from samq.llamacpp.prediction_layers import count_in_weights, weight_names

Config = dict[str, Any]

_SCORES = ("score_function", "scoring_func", "score_func", "moe_router_activation", "moe_router_activation_func")

# Name of the class in transformers -> in published configurations, and so in the converter
ARCHITECTURES = {"MptForCausalLM": "MPTForCausalLM", "PhimoeForCausalLM": "PhiMoEForCausalLM"}
# Kind of layer in transformers 5 -> in published configurations
GRANITE_LAYERS = {"linear_attention": "mamba", "full_attention": "attention"}
NEMOTRON_LAYERS = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "mlp": "-",
    "moe": "E",
}


def _rotated(config: Config) -> int:
    """How many values of each head the rotary embedding turns."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(head * config["rope_parameters"].get("partial_rotary_factor", 1.0))


def _positions(config: Config) -> Config:
    return {"n_ctx": config["n_positions"]}


def _sigmoid(config: Config) -> Config:
    """transformers routes with the sigmoid whatever the file says; llama.cpp takes softmax if it says nothing."""
    return {} if any(config.get(key) for key in _SCORES) else {"scoring_func": "sigmoid"}


def _falcon(config: Config) -> Config:
    """transformers fills in a number of key and value heads that it does not use itself."""
    one = config["multi_query"] and not config["new_decoder_architecture"]
    return {"num_kv_heads": 1} if one else {}


def _nemotron_h(config: Config) -> Config:
    """transformers fills in experts, so that the converter takes a dense model for a mixture of experts."""
    kinds = config["layers_block_type"]
    pattern = kinds if isinstance(kinds, str) else "".join(NEMOTRON_LAYERS[kind] for kind in kinds)
    dense = {} if "E" in pattern else {"num_experts_per_tok": None, "n_routed_experts": None, "n_group": None}
    return {"hybrid_override_pattern": pattern, **dense}


def _granite_hybrid(config: Config) -> Config:
    return {"layer_types": [GRANITE_LAYERS.get(kind, kind) for kind in config["layer_types"]]}


def _mimo(config: Config) -> Config:
    """transformers keeps one shape of attention heads, and twice the key and value heads where a layer has a window."""
    windowed = [kind == "sliding_attention" for kind in config["layer_types"]]
    rotated = config["rope_parameters"]["full_attention"]["partial_rotary_factor"]
    shared = ("head_dim", "num_attention_heads", "v_head_dim")
    return {
        **{f"swa_{name}": config[name] for name in shared},
        "swa_num_key_value_heads": 2 * config["num_key_value_heads"],
        "hybrid_layer_pattern": [int(window) for window in windowed],
        "layernorm_epsilon": config["rms_norm_eps"],
        "rope_parameters": config["rope_parameters"] | {"partial_rotary_factor": rotated},
        "topk_method": "noaux_tc",
    }


# Model type -> what its configuration needs; None stands for a key that has to go.
COMPLETIONS: Mapping[str, Callable[[Config], Config]] = {
    "bamba": lambda config: {"attn_rotary_emb": _rotated(config)},
    "cohere2": lambda _: {"rotary_pct": 1.0},
    "deepseek_v3": _sigmoid,
    "falcon": _falcon,
    "glm4_moe_lite": _sigmoid,
    "gpt2": _positions,
    "gpt_bigcode": _positions,
    "gpt_neox": lambda config: {"rotary_pct": config["rope_parameters"].get("partial_rotary_factor", 0.25)},
    "granitemoehybrid": _granite_hybrid,
    "mimo_v2_flash": _mimo,
    "minimax_m2": lambda config: {"rotary_dim": _rotated(config)} | _sigmoid(config),
    "nemotron_h": _nemotron_h,
}


def completed(config: Config) -> Config:
    """The configuration that transformers read, with the keys and names that the converter looks for."""
    complete = COMPLETIONS.get(config.get("model_type", ""))
    changes: Config = {}
    if complete is not None:
        with suppress(KeyError, TypeError):  # a file of another time, which the converter may know
            changes = complete(config)
    if names := config.get("architectures"):
        changes["architectures"] = [ARCHITECTURES.get(name, name) for name in names]
    return {key: value for key, value in (config | changes).items() if value is not None or key not in changes}


def partial_rotary_order(rows: int, head: int, rotated: int) -> list[int]:
    """GGUF row -> torch row of queries or keys: the two halves of each head's `rotated` rows interleaved, the rest as it is."""
    half = rotated // 2
    of_head = [row // 2 + half * (row % 2) if row < rotated else row for row in range(head)]
    return [start + row for start in range(0, rows, head) for row in of_head]


def _completing(load: Callable[..., Config], base: Any) -> Callable[..., Config]:
    @wraps(load)
    def load_completed(folder: Path, *arguments: Any, **named: Any) -> Config:
        config = completed(load(folder, *arguments, **named))
        text = config.get("text_config")
        if isinstance(text, dict):
            config["text_config"] = text = completed(text)
        layers = (text or config).get("num_hidden_layers")
        names = weight_names(Path(folder))
        if names and isinstance(layers, int):  # else the GGUF would promise layers that it does not have
            base.no_mtp = not count_in_weights(names, layers)
        return config

    return load_completed


def _yielding_what_it_returns(modify: Callable[..., Any]) -> Callable[..., Any]:
    """For a generator that returns an iterator of more tensors, which are lost so (StableLM 2 12B's norms)."""

    @wraps(modify)
    def yielding(*arguments: Any) -> Iterator[Any]:
        yield from (yield from modify(*arguments)) or ()

    return yielding


def _with_partial_rotary(modify: Callable[..., Any]) -> Callable[..., Any]:
    """Interleave what is rotated only (Bamba): the converter interleaves the rows of whole heads."""

    @wraps(modify)
    def rotating(self: Any, tensor: Any, name: str, block: int | None) -> Iterator[Any]:
        rotated, head = self.hparams.get("attn_rotary_emb"), 0
        if rotated and name.endswith(("q_proj.weight", "k_proj.weight")):
            head = self.hparams.get("head_dim") or self.hparams["hidden_size"] // self.hparams["num_attention_heads"]
        if head > (rotated or 0):
            rows = tensor.shape[0]
            wanted = partial_rotary_order(rows, head, rotated)
            done = partial_rotary_order(rows, head, head)  # what the converter is about to do
            before = [0] * rows
            for row, place in enumerate(done):
                before[place] = wanted[row]
            tensor = tensor[before]
        yield from modify(self, tensor, name, block)

    return rotating


def _joining_attention(modify: Callable[..., Any]) -> Callable[..., Any]:
    """Join queries, keys and values of MiMo's layers of prediction: llama.cpp takes them joined only (src/models/mimo2.cpp)."""

    @wraps(modify)
    def joining(self: Any, tensor: Any, name: str, block: int | None) -> Iterator[Any]:
        if match := re.fullmatch(r"(model\.mtp\.layers\.\d+\.self_attn\.)([qkv])_proj\.weight", name):
            parts = vars(self).setdefault("_attention_parts", {}).setdefault(match[1], {})
            parts[match[2]] = tensor
            if len(parts) < 3:
                return
            import torch  # the converter's

            tensor, name = torch.cat([parts[part] for part in "qkv"]), f"{match[1]}qkv_proj.weight"
        yield from modify(self, tensor, name, block)

    return joining


def _with_completed_file(initialize: Callable[..., None]) -> Callable[..., None]:
    """Mamba-2 and hybrids read config.json themselves, so what transformers wrote there is completed here."""

    @wraps(initialize)
    def initialize_completed(self: Any, folder: Path, *arguments: Any, **named: Any) -> None:
        if named.get("hparams") is None:
            named["hparams"] = completed(json.loads((folder / "config.json").read_text()))
        initialize(self, folder, *arguments, **named)

    return initialize_completed


def _with_tokenizer_json(set_vocab: Callable[..., None]) -> Callable[..., None]:
    """Read tokenizer.json, as for the dense Hunyuan: the converter knows only the published folder's own code."""

    @wraps(set_vocab)
    def set_vocab_of_file(self: Any) -> None:
        dense = _class("hunyuan", "HunYuanModel")
        read = dense.set_vocab if dense and (self.dir_model / "tokenizer.json").is_file() else set_vocab
        read(self)

    return set_vocab_of_file


def _keep_prediction_layer(base: Any) -> None:
    """Convert DeepSeek-V3 by GLM-4.7-Flash's class, which is of the same architecture and keeps the layer that predicts a
    further token. The converter leaves DeepSeek's out, though llama.cpp reads both alike (src/models/deepseek2.cpp).
    """
    deepseek, glm = _class("deepseek", "DeepseekV2Model"), _class("glm", "Glm4MoeLiteModel")
    if deepseek and glm and deepseek.skip_mtp:
        own = {"model_arch": glm.model_arch, "set_vocab": deepseek.set_vocab}
        base.register("DeepseekV3ForCausalLM")(type("DeepseekV3Model", (glm,), own))


def mend(converter: Path) -> None:
    """Change the converter's modules in this process. Those that a llama.cpp of another time does not have are left out."""
    sys.path.insert(0, str(converter.parent))
    if "NO_LOCAL_GGUF" not in os.environ:  # as the converter does it, since this import comes before its own
        sys.path.insert(1, str(converter.parent / "gguf-py"))
    base = _class("base", "ModelBase")
    if base is None:
        return
    base.load_hparams = staticmethod(_completing(base.load_hparams, base))
    _keep_prediction_layer(base)
    for module, name, method, wrap in (
        ("stablelm", "StableLMModel", "modify_tensors", _yielding_what_it_returns),
        ("granite", "GraniteHybridModel", "modify_tensors", _with_partial_rotary),
        ("mamba", "Mamba2Model", "__init__", _with_completed_file),
        ("mimo", "MimoV2Model", "modify_tensors", _joining_attention),
        ("hunyuan", "HunYuanMoEModel", "set_vocab", _with_tokenizer_json),
    ):
        if model := _class(module, name):
            setattr(model, method, wrap(getattr(model, method)))


def _class(module: str, name: str) -> Any:
    """A class of the converter; None if this llama.cpp does not have it."""
    try:
        return getattr(importlib.import_module(f"conversion.{module}"), name, None)
    except ImportError:
        return None


def main(converter: Path, arguments: list[str]) -> None:
    """Run the converter as if it had been called with these arguments."""
    mend(converter)
    sys.argv = [str(converter), *arguments]
    runpy.run_path(str(converter), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
