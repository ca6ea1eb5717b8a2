"""Gradients in large_model.py: the model loaded, its sensitivities measured on random tokens, and what that took."""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from large_ceilings import drop_page_cache
from large_llama import SEED
from large_stages import Stages, peak_rss

from samq.data.tokens import TokenBatch
from samq.gguf.file import gguf_names
from samq.records import SensitivityMap
from samq.sensitivity.blocks import Blocks
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.fisher import Fisher
from samq.sensitivity.hf_model import load_model
from samq.sensitivity.layout import GgufLayout, weights_of
from samq.sensitivity.loss import Labelling
from samq.sensitivity.measure import Origin, measure_sensitivity
from samq.sensitivity.memory import Memory, compute_device, compute_devices
from samq.sensitivity.offloading import has_offloaded

Measured = tuple[SensitivityMap, dict[str, Fisher]]


@dataclass
class Run:
    """A model and the sequences that it is measured on."""

    model: Any
    layout: GgufLayout
    tokens: TokenBatch
    work: Path
    arguments: argparse.Namespace
    steps: list[float] = field(default_factory=list)  # seconds at the start of a pass, after each block, and at the end

    def gradients(self, sequences: int, devices: tuple[torch.device, ...]) -> Measured:
        """The map and the Fisher information of so many sequences; sets `steps`."""
        self.steps.clear()
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self.work) as scratch:
            measured = measure_sensitivity(
                self.model,
                self.tokens.part(0, sequences),
                self.layout,
                Origin("", ""),
                labelling=Labelling("model", SEED),
                batch_size=self.arguments.batch_size,
                memory=Memory(self.arguments.limit, Path(scratch) / "going-on", devices),
                progress=lambda *_: self.steps.append(time.perf_counter() - started),
            )
            for number in range(torch.cuda.device_count()):
                torch.cuda.synchronize(number)
        self.steps.append(time.perf_counter() - started)
        return measured

    @property
    def by_part(self) -> dict[str, float]:
        """Seconds of the parts of the last pass; none of a model that went through whole."""
        steps, blocks = self.steps, self.model.config.num_hidden_layers
        if len(steps) < 2 * blocks + 2:
            return {}
        each = [after - before for before, after in pairwise(steps)]
        return {
            "forward_s": steps[blocks],
            "turn_and_last_block_s": each[blocks],
            "backward_s": steps[-1] - steps[blocks],
            "forward_block_s": statistics.median(each[:blocks]),
            "backward_block_s": statistics.median(each[blocks + 1 : 2 * blocks]),
        }


def measure(folder: Path, work: Path, arguments: argparse.Namespace, stages: Stages) -> tuple[dict, dict[str, Path]]:
    """Load the model, measure its sensitivities, and write GGUFs for the budgets; what that took, and the files."""
    if arguments.whole:
        Blocks.of = lambda _: None  # type: ignore[method-assign,assignment]
    devices = compute_devices(arguments.device)[: arguments.devices]
    before = peak_rss()
    with stages.of("load"):
        source = describe_source(folder)
        model, _ = load_model(source, arguments.dtype, arguments.device, memory_limit=arguments.limit)
    names = gguf_names({"general.architecture": "llama", "llama.block_count": model.config.num_hidden_layers})
    layout, agreement = GgufLayout(weights_of(model, names)), {}
    if arguments.budgets:
        from large_rounding import prepare

        layout, agreement["agreement"] = prepare(model, source, names, work / "full.gguf", arguments, stages)
    run = Run(model, layout, random_tokens(model.config.vocab_size, arguments), work, arguments)
    if compute_device(arguments.device).startswith("cuda") and (len(devices) > 1 or not has_offloaded(model)):
        run.gradients(2 * len(devices), devices)  # loads CUDA's libraries
    settle(arguments)
    with stages.of("gradients"):
        sensitivities = run.gradients(arguments.sequences, devices)
    figures = agreement | figures_of(run, sensitivities[0], devices, stages)
    figures |= {"peak_rss_before_bytes": before}
    if len(devices) > 1:
        figures["several"] = against_one(run, sensitivities, devices)
    files = {}
    if arguments.budgets:
        from large_rounding import measure_rounding

        memory = Memory(arguments.limit, devices=devices)
        full = work / "full.gguf"
        files = measure_rounding(model, layout, run.tokens, sensitivities, full, memory, arguments, stages)
    return figures, files


def random_tokens(vocabulary: int, arguments: argparse.Namespace) -> TokenBatch:
    """The sequences."""
    shape = arguments.sequences, arguments.tokens
    ids = np.random.default_rng(SEED).integers(0, vocabulary, shape, dtype=np.int32)
    return TokenBatch(ids, np.full(arguments.sequences, arguments.tokens, dtype=np.int32))


def settle(arguments: argparse.Namespace) -> None:
    """Before a pass: what was written goes to disk, and not beside the pass; with --cold the pass reads from the disk."""
    os.sync()
    if arguments.cold:
        drop_page_cache()


def figures_of(
    run: Run, sensitivity: SensitivityMap, devices: tuple[torch.device, ...], stages: Stages
) -> dict[str, Any]:
    """What the last pass took, and what it computed and read."""
    model, seconds = run.model, run.steps[-1]
    in_blocks = sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.ndim == 2)
    head = model.lm_head.weight.numel()
    flop = 6 * (in_blocks + head) * run.tokens.ids.size
    bytes_read = 2 * in_blocks * 2  # of bf16, there and back
    return {
        "loss_nats": sensitivity.loss_nats,
        "blocks": model.config.num_hidden_layers,
        "on_disk": has_offloaded(model),
        "weights": in_blocks + 2 * head,
        "weights_in_blocks": in_blocks,
        "weights_used": in_blocks + head,  # the embedding is looked up
        "load_s": stages.figures["load"]["seconds"],
        "seconds": seconds,
        **run.by_part,
        "devices": len(devices),
        "flop": flop,
        "flops": flop / seconds,
        "bytes_read": bytes_read,
        "bytes_per_s": bytes_read / seconds,
        "peak_gpu_bytes": _peak_gpu_bytes("allocated"),
        "peak_gpu_reserved_bytes": _peak_gpu_bytes("reserved"),
        "peak_rss_bytes": stages.most("peak_rss_bytes"),
    }


def _peak_gpu_bytes(figure: str) -> int | None:
    """The highest of all GPUs, of torch's peaks by this name; None without a GPU."""
    peak = getattr(torch.cuda, f"max_memory_{figure}")
    return max((peak(number) for number in range(torch.cuda.device_count())), default=None)


def against_one(run: Run, measured: Measured, devices: tuple[torch.device, ...]) -> dict[str, Any]:
    """The same pass on the first device alone: how much faster all are, and whether the bits are the same."""
    seconds = run.steps[-1]
    settle(run.arguments)
    alone = run.gradients(run.arguments.sequences, devices[:1])
    return {
        "speed_up": run.steps[-1] / seconds,
        "same_bits": _digest(alone) == _digest(measured),
        "one_device": {"seconds": run.steps[-1], **run.by_part},
    }


def _digest(measured: Measured) -> str:
    sensitivity, fisher = measured
    content = hashlib.sha256(sensitivity.model_dump_json().encode())
    for name, of_one in sorted(fisher.items()):
        content.update(name.encode() + of_one.rows.tobytes() + of_one.columns.tobytes())
    return content.hexdigest()
