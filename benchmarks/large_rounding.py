"""What follows the gradients in large_model.py: layers' inputs, prices, plans, and compensated GGUFs, each with what it took."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open

from samq.allocation.budget import BudgetPolicy, budget_plan, parse_budget
from samq.allocation.prices import price_table
from samq.allocation.target import OpenTarget
from samq.allocation.types import legal_types, types_to_price
from samq.data.tokens import TokenBatch
from samq.gguf.audit import audit, provenance_metadata
from samq.gguf.file import HashedFile, gguf_names, read_metadata
from samq.gguf.imatrix import write_imatrix
from samq.gguf.nearest import NearestRounding
from samq.llamacpp.toolchain import find_toolchain
from samq.quantization.compensation import compensated_prices, write_compensated
from samq.quantization.inputs import measure_inputs
from samq.quantization.planned_file import PlannedFile
from samq.records import SensitivityMap
from samq.sensitivity.fisher import Fisher
from samq.sensitivity.gram import input_moments
from samq.sensitivity.layout import read_layout
from samq.sensitivity.memory import Memory


class Stages:
    """Figures of stages: seconds, peak memory of the GPU and of the process, and bytes on disk."""

    def __init__(self, work: Path, *, cuda: bool) -> None:
        self.figures: dict[str, dict[str, Any]] = {}
        self._work, self._cuda = work, cuda

    @contextmanager
    def of(self, name: str) -> Iterator[dict[str, Any]]:
        """Measure what happens within; more figures may be added to what this gives."""
        figures = self.figures[name] = {}
        gpus = range(torch.cuda.device_count()) if self._cuda else []
        torch.cuda.empty_cache()
        for gpu in gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        started = time.perf_counter()
        yield figures
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
            figures["peak_gpu_bytes"] = max(figures.get("peak_gpu_bytes", 0), torch.cuda.max_memory_allocated(gpu))
        figures["seconds"] = time.perf_counter() - started
        figures["disk_bytes"] = sum(file.stat().st_size for file in self._work.rglob("*") if file.is_file())
        gpu = f", {figures.get('peak_gpu_bytes', 0) / 2**30:.2f} GiB of the GPU" if self._cuda else ""
        disk = figures["disk_bytes"] / 1e9
        print(f"{name:26} {figures['seconds']:.1f} s{gpu}, {disk:.1f} GB on disk", flush=True)


def write_gguf(folder: Path, path: Path) -> Path:
    """The BF16 GGUF of the folder's Llama, one tensor at a time."""
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
        stored = values.view(torch.uint8).numpy() if values.ndim > 1 else values.float().numpy()
        writer.write_tensor_data(stored)
    writer.close()
    return path


def measure_rounding(
    folder: Path,
    model: Any,
    tokens: TokenBatch,
    measured: tuple[SensitivityMap, dict[str, Fisher]],
    *,
    batch_size: int,
    memory: Memory,
    budgets: list[str],
    types: list[str],
) -> dict[str, dict[str, Any]]:
    """Stage -> its figures."""
    work = folder.with_name(f"{folder.name}-rounding")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    stages = Stages(folder.parent, cuda=torch.cuda.is_available() and next(model.lm_head.parameters()).is_cuda)
    toolchain = find_toolchain()
    with stages.of("full-precision GGUF"):
        full = write_gguf(folder, work / "full.gguf")
    with stages.of("compare with the GGUF"):
        layout = read_layout(model, gguf_names(read_metadata(full)), full, lambda *_: None)
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
        types = types_to_price(target, types)
        table = price_table(target, legal_types(target, types), *measured)
        figures["weights_per_s"] = len(types) * sum(tensor.weights for tensor in target.quantizable.values())
    figures["weights_per_s"] /= figures["seconds"]
    with stages.of("plans"):
        prices = compensated_prices(table, statistics.shares)
        plans = {
            budget: budget_plan(target, prices, parse_budget(budget, target), BudgetPolicy()) for budget in budgets
        }
    with stages.of("compensated GGUFs") as figures:
        files = {
            name: PlannedFile.create(work / f"{name}.gguf", full, plan, provenance_metadata(plan, {}), matrix)
            for name, plan in plans.items()
        }
        memory, rounding = replace(memory, folder=work / "going-on-compensate"), NearestRounding(full, matrix)
        pieces = input_moments(model, tokens, layout.weights, batch_size=batch_size, memory=memory)
        errors = write_compensated(
            files, rounding, rounding, pieces, work / "errors", everything=True, devices=memory.devices
        )
    for name, plan in plans.items():
        audit(files[name].path, plan)
        ratios = sorted(error.ratio for error in errors[name].tensors.values())
        figures[f"error_left_{name}"] = ratios[len(ratios) // 2]
        print(f"{name:26} {len(ratios)} tensors keep {ratios[len(ratios) // 2]:.2f} of the output error (median)")
    shutil.rmtree(work)
    return stages.figures
