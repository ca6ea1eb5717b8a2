"""Full-precision GGUF, layers' inputs, prices, plans and compensated GGUFs in large_model.py, each with what it took."""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from large_evaluation import compare_with_torch
from large_stages import Stages
from safetensors import safe_open

from samq.allocation.budget import BudgetPolicy, budget_plan, parse_budget
from samq.allocation.prices import price_table
from samq.allocation.target import OpenTarget
from samq.allocation.types import legal_types, types_to_price
from samq.data.tokens import TokenBatch
from samq.gguf.audit import audit, provenance_metadata
from samq.gguf.file import HashedFile, gguf_names
from samq.gguf.imatrix import write_imatrix
from samq.gguf.nearest import NearestRounding
from samq.llamacpp.toolchain import find_toolchain
from samq.quantization.compensated_file import PlannedFile
from samq.quantization.compensation import compensated_prices, write_compensated
from samq.quantization.inputs import measure_inputs
from samq.records import ModelSource, SensitivityMap
from samq.sensitivity.fisher import Fisher
from samq.sensitivity.gram import input_moments
from samq.sensitivity.layout import GgufLayout, read_layout
from samq.sensitivity.memory import Memory
from samq.sensitivity.views import rotary_row_order


def write_gguf(folder: Path, path: Path) -> Path:
    """The BF16 GGUF of the folder's Llama, one tensor at a time, as llama.cpp's converter stores it, but without a tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    names = gguf_names({"general.architecture": "llama", "llama.block_count": config["num_hidden_layers"]})
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    shapes = {}
    for name, file in index.items():
        with safe_open(folder / file, "pt") as content:
            shapes[name] = tuple(content.get_slice(name).get_shape())
        kind = gguf.GGMLQuantizationType.BF16 if len(shapes[name]) > 1 else gguf.GGMLQuantizationType.F32
        itemsize = 2 if len(shapes[name]) > 1 else 4
        size = int(np.prod(shapes[name])) * itemsize
        shape = (*shapes[name][:-1], shapes[name][-1] * itemsize) if itemsize == 2 else shapes[name]
        writer.add_tensor_info(names(name), shape, np.dtype(np.uint8 if itemsize == 2 else np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, file in index.items():
        with safe_open(folder / file, "pt") as content:
            values = content.get_tensor(name)
        if heads := {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(
            name.split(".")[-2]
        ):
            values = values[rotary_row_order(len(values), heads)]
        stored = values.view(torch.uint8).numpy() if values.ndim > 1 else values.float().numpy()
        writer.write_tensor_data(stored)
    writer.close()
    return path


def prepare(
    model: Any,
    source: ModelSource,
    names: Callable[[str], str | None],
    full: Path,
    arguments: argparse.Namespace,
    stages: Stages,
) -> tuple[GgufLayout, dict[str, Any]]:
    """Write the full-precision GGUF, and compare weights and predictions: the layout, and the agreement."""
    with stages.of("full-precision GGUF"):
        write_gguf(source.folder, full)
    with stages.of("compare with the GGUF"):
        layout = read_layout(model, names, full)
    if layout.unknown:
        raise SystemExit(layout.unmeasured)
    return layout, compare_with_torch(model, source, arguments.dtype, full, arguments.limit, stages)


def measure_rounding(
    model: Any,
    layout: GgufLayout,
    tokens: TokenBatch,
    measured: tuple[SensitivityMap, dict[str, Fisher]],
    full: Path,
    memory: Memory,
    arguments: argparse.Namespace,
    stages: Stages,
) -> dict[str, Path]:
    """Measure the stages, and write a compensated GGUF for each of `arguments.budgets` beside `full`: budget -> file."""
    work, batch_size = full.parent, arguments.batch_size
    toolchain = find_toolchain()
    with stages.of("inputs of layers"):
        of_inputs = replace(memory, folder=work / "going-on-inputs")
        statistics = measure_inputs(model, tokens, layout.weights, shares=True, batch_size=batch_size, memory=of_inputs)
    matrix = work / "imatrix.gguf"
    write_imatrix(
        matrix,
        statistics.importance,
        dataset="random",
        sequences=len(tokens),
        sequence_tokens=int(tokens.lengths.max()),
    )
    target = OpenTarget.open(HashedFile(full, "full"), toolchain, HashedFile(matrix, "matrix"))
    with stages.of("prices") as figures:
        types = types_to_price(target, arguments.types)
        table = price_table(target, legal_types(target, types), *measured)
        figures["weights_per_s"] = len(types) * sum(tensor.weights for tensor in target.quantizable.values())
    figures["weights_per_s"] /= figures["seconds"]
    with stages.of("plans"):
        prices = compensated_prices(table, statistics.shares)
        plans = {
            budget: budget_plan(target, prices, parse_budget(budget, target), BudgetPolicy())
            for budget in arguments.budgets
        }
    with stages.of("compensated GGUFs") as figures:
        files = {
            name: PlannedFile.create(work / f"{name}.gguf", full, plan, provenance_metadata(plan, {}), matrix)
            for name, plan in plans.items()
        }
        memory, rounding = replace(memory, folder=work / "going-on-compensate"), NearestRounding(full, matrix)
        pieces = input_moments(model, tokens, layout.weights, batch_size=batch_size, memory=memory)
        if arguments.blocks_compensated is not None:
            pieces = takewhile(lambda piece: piece.part < arguments.blocks_compensated, pieces)  # no later block runs
        errors = write_compensated(
            files, rounding, rounding, pieces, work / "errors", everything=True, devices=memory.devices
        )
    for name, plan in plans.items():
        audit(files[name].path, plan)
        ratios = sorted(error.ratio for error in errors[name].tensors.values())
        if not ratios:  # --blocks-compensated 0
            continue
        figures[f"error_left_{name}"] = ratios[len(ratios) // 2]
        print(f"{name:26} {len(ratios)} tensors keep {ratios[len(ratios) // 2]:.2f} of the output error (median)")
    return {name: file.path for name, file in files.items()}
