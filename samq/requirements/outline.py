"""A model in outline: a full-precision GGUF with all names, shapes and types, and with no weights.

llama-quantize says of an outline which types a mixture has, as of the model itself: it does not read the weights for that. So
sizes of plans are known before anything is converted. The file is sparse and takes some megabytes of disk.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import torch
from gguf.constants import MODEL_ARCH_NAMES
from transformers import AutoConfig, PreTrainedModel

from samq.errors import SamqError
from samq.gguf.file import TensorInfo, gguf_names, read_metadata, read_tensors
from samq.gguf.formats import EMBEDDING, FULL_PRECISION, OUTPUT, tensor_bytes
from samq.gguf.imatrix import ImatrixEntry, write_imatrix
from samq.quantization.compensated_file import PlannedFile
from samq.records import Plan
from samq.sensitivity.checkpoint import HUB_ID, local_path, read_config, weight_files
from samq.sensitivity.hf_model import model_class_of
from samq.sensitivity.published_types import dequantize_at_load, quantization_of

_BLOCK = re.compile(r"blk\.(\d+)\.")
_TORCH_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Outline:
    """A model's shapes, and where its weights are."""

    gguf: Path  # sparse, or the model's own if it is in full precision
    used_experts: float = 1.0  # the share of stacked experts that a token enters
    source_bytes: int = 0  # of the files that are on this machine
    download_bytes: int = 0  # that the hub still has to give
    is_gguf: bool = False  # torch reads a GGUF, and not a folder
    is_full_gguf: bool = False  # which is in full precision, so that it is linked and not converted

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Name -> tensor."""
        return read_tensors(self.gguf)

    @property
    def bytes(self) -> int:
        """Of the full-precision GGUF."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    @cached_property
    def blocks(self) -> list[list[TensorInfo]]:
        """The tensors of each decoder block."""
        blocks: dict[str, list[TensorInfo]] = {}
        for name, tensor in self.tensors.items():
            if match := _BLOCK.match(name):
                blocks.setdefault(match[1], []).append(tensor)
        return list(blocks.values())

    @cached_property
    def largest_block(self) -> list[TensorInfo]:
        """The tensors of the block with the most weights."""
        return max(self.blocks, key=_weights)

    @cached_property
    def around(self) -> dict[str, TensorInfo]:
        """Name -> tensor, of those in no block: embedding, output, norm."""
        return {name: tensor for name, tensor in self.tensors.items() if not _BLOCK.match(name)}

    @property
    def weights(self) -> int:
        """Of the whole model."""
        return _weights(self.tensors.values())

    @property
    def weights_in_blocks(self) -> int:
        """Of all blocks."""
        return sum(map(_weights, self.blocks))

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.tensors[EMBEDDING].shape[0]

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return self.tensors[EMBEDDING].row_length

    @property
    def active_weights(self) -> float:
        """Weights that a token is multiplied with: of the blocks, with the experts that it enters, and of the output."""
        matrices = [tensor for block in self.blocks for tensor in block if len(tensor.shape) > 1]
        return sum(tensor.weights * self.share(tensor) for tensor in matrices) + self.vocabulary * self.width

    def share(self, tensor: TensorInfo) -> float:
        """The share of a tensor that a token is multiplied with."""
        return self.used_experts if len(tensor.shape) > 2 else 1.0


def _weights(tensors: Any) -> int:
    return sum(tensor.weights for tensor in tensors)


def read_outline(source: str, revision: str | None, precision: str, work: Path) -> Outline:
    """The outline of a model, which is written into the folder `work`; nothing is downloaded and no weights are read.

    Args:
        source: as for `samq.sensitivity.checkpoint.describe_source`.
        revision: branch, tag or commit of a hub id.
        precision: F16 or BF16, of the matrices in full precision.
        work: an existing folder.

    Raises:
        SamqError: the model is not on this machine, or transformers does not know it.
    """
    path = local_path(source.removeprefix("rescaled:"))
    if path.suffix == ".gguf":
        return _of_gguf(path, precision, work, is_rescaled=source.startswith("rescaled:"))
    if path.exists() or not HUB_ID.fullmatch(source):
        size = sum(file.stat().st_size for file in weight_files(path))
        return _of_folder(path, precision, work, source_bytes=size)
    folder = _cached(source, revision)
    try:
        return _of_folder(
            folder, precision, work, source_bytes=sum(file.stat().st_size for file in weight_files(folder))
        )
    except SamqError:
        return _of_folder(folder, precision, work)


def write_even_importance(outline: Outline, folder: Path) -> Path:
    """An importance matrix with an entry for every matrix but the embedding, as the run will make one; returns its path."""
    entries = {}
    for name, tensor in outline.tensors.items():
        if len(tensor.shape) > 1 and name != EMBEDDING and name.endswith(".weight"):
            matrices = math.prod(tensor.shape[:-2])
            entries[name] = ImatrixEntry(
                np.ones((matrices, tensor.row_length), np.float32), np.ones(matrices, np.int64)
            )
    write_imatrix(folder / "even.gguf", entries, dataset="none", sequences=1, sequence_tokens=1)
    return folder / "even.gguf"


def _cached(hub_id: str, revision: str | None) -> Path:
    """The folder of a hub id's configuration in the hub's cache."""
    config = huggingface_hub.try_to_load_from_cache(hub_id, "config.json", revision=revision)
    if not isinstance(config, str):
        at = f" --revision {revision}" if revision else ""
        raise SamqError(
            f"{hub_id} is not on this machine, so its size is not known; run `hf download {hub_id} config.json{at}`, which takes "
            "some kilobytes, and ask again"
        )
    return Path(config).parent


def _of_gguf(path: Path, precision: str, work: Path, *, is_rescaled: bool) -> Outline:
    tensors, metadata = read_tensors(path), read_metadata(path)
    architecture = metadata.get("general.architecture")
    experts, used = (metadata.get(f"{architecture}.{key}", 0) for key in ("expert_count", "expert_used_count"))
    types = {
        name: precision
        for name, tensor in tensors.items()
        if len(tensor.shape) > 1 and tensor.type not in FULL_PRECISION
    }
    outline = path
    if types:
        outline = work / "outline.gguf"
        PlannedFile.create(outline, path, _plan_of(tensors, types, precision), {})
    return Outline(
        outline,
        used_experts=used / experts if experts else 1.0,
        source_bytes=path.stat().st_size,
        is_gguf=True,
        is_full_gguf=not types and not is_rescaled,
    )


def _plan_of(tensors: Mapping[str, TensorInfo], types: dict[str, str], precision: str) -> Plan:
    sizes = [tensor_bytes(types.get(name, tensor.type), tensor.shape) for name, tensor in tensors.items()]
    weights = _weights(tensors.values())
    return Plan(
        name="outline",
        policy="full",
        parameters={},
        types=types,
        mixture=precision,
        tensor_bytes=sum(sizes),
        weights=weights,
        gguf_sha256="",
    )


def _of_folder(folder: Path, precision: str, work: Path, *, source_bytes: int = 0) -> Outline:
    """`source_bytes` are those of the weights' files; 0 if they are not there yet."""
    skeleton = _skeleton(folder)
    is_mxfp4 = (quantization_of(read_config(folder)) or {}).get("quant_method") == "mxfp4"
    config = skeleton.config.get_text_config()
    tensors = _tensors(skeleton, precision, "MXFP4" if is_mxfp4 else precision)
    path = work / "outline.gguf"
    _write(path, config, tensors)
    experts = _largest(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    used = _largest(config, "num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k") or experts
    size = sum(tensor_bytes(kind, shape) for shape, kind in tensors.values())
    return Outline(
        path,
        used_experts=used / experts if experts else 1.0,
        source_bytes=source_bytes,
        download_bytes=0 if source_bytes else size,
    )


def _largest(config: Any, *keys: str) -> int:
    """The first of these numbers that a configuration has, of a list the largest; 0 if it has none."""
    value = next((value for key in keys if (value := getattr(config, key, None))), 0)
    return max(value) if isinstance(value, list) else int(value)


def _skeleton(folder: Path) -> PreTrainedModel:
    """The model of a folder on torch's meta device, as `samq.sensitivity.hf_model.load_model` makes one."""
    read_config(folder)  # says what is wrong with it
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        dequantize_at_load(config)
        with torch.device("meta"):
            model: PreTrainedModel = model_class_of(config).from_config(config)
    except (OSError, TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise SamqError(f"transformers does not know the model in {folder} ({reason}); give a causal LM") from error
    return model


def _tensors(skeleton: PreTrainedModel, precision: str, experts: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """GGUF name -> shape and type of the text part's tensors; those of unknown names have one with their block's number."""
    architecture = skeleton.config.get_text_config().model_type
    architecture = architecture if architecture in MODEL_ARCH_NAMES.values() else "llama"
    blocks = skeleton.config.get_text_config().num_hidden_layers
    gguf_name = gguf_names({"general.architecture": architecture, f"{architecture}.block_count": blocks})
    ends = {
        id(skeleton.get_input_embeddings().weight): EMBEDDING,
        id(skeleton.get_output_embeddings().weight): OUTPUT,
    }
    if len(ends) == 1:  # tied
        ends = dict.fromkeys(ends, EMBEDDING)
    text = {id(parameter) for parameter in skeleton.get_decoder().parameters()} | ends.keys()
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, parameter in skeleton.named_parameters():
        if id(parameter) not in text:
            continue
        known = ends.get(id(parameter)) or gguf_name(name)
        if known is None or known in tensors:
            block = _TORCH_BLOCK.search(name)
            known = f"blk.{block[1]}.x{len(tensors)}" if block else f"x{len(tensors)}"
        if parameter.ndim > 1 and not known.endswith(".weight"):  # else llama-quantize leaves it as it is
            known += ".weight"
        kind = {1: "F32", 3: experts}.get(parameter.ndim, precision)
        tensors[known] = tuple(parameter.shape), kind
    return tensors


def _write(path: Path, config: Any, tensors: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """Write the outline with what llama-quantize looks at; it chooses types by the names of tensors, not by the architecture."""
    heads = getattr(config, "num_attention_heads", None) or 1
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(getattr(config, "max_position_embeddings", None) or 1)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or config.hidden_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(config.vocab_size)
    size = 0
    for name, (shape, kind) in tensors.items():
        row = tensor_bytes(kind, shape[-1:])
        dtype = np.dtype(np.float32 if kind == "F32" else np.uint8)
        stored = shape if kind == "F32" else (*shape[:-1], row)
        bytes_ = math.prod(shape[:-1]) * row
        writer.add_tensor_info(name, stored, dtype, bytes_, gguf.GGMLQuantizationType[kind])
        size += -(-bytes_ // gguf.GGUF_DEFAULT_ALIGNMENT) * gguf.GGUF_DEFAULT_ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, path.stat().st_size + gguf.GGUF_DEFAULT_ALIGNMENT + size)
