"""Claims: gradients of a model far larger than the memory; what they take of it and how fast they are.

    python benchmarks/large_model.py --shape 2b [--blocks N] [--device cpu] [--memory-limit 4GiB] [--json OUT.json]

A Llama with random weights of the shape is written to disk in bf16, a file a block (--work keeps it). Then the flow's
measurement of sensitivities runs on random tokens, with the model's blocks on disk if they do not fit the limit. The figures:
peak memory of the device and of the process, seconds, and the rates of arithmetic and of reading weights, against the ceilings
of both, which are measured in the same run. --blocks takes fewer blocks than the shape has; the time of all is then a product.
With --device auto, all GPUs share the sequences (or --devices of them). The pass then runs on one of them as well: `several` has
the speed-up, and whether the bits are the same.
With --budgets all stages run: full-precision GGUF, agreement of torch and llama.cpp, gradients, inputs of layers, prices, plans,
a compensated GGUF for each budget, the baseline's logits, and each GGUF's KL divergence (in llama.cpp, on a GPU if it was built
for one; with --memory-limit no more of the GPU is free). Needs none of prefect, mlflow, datasets and lm-eval.
"""

import argparse
import gc
import hashlib
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

DEFAULT_TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
SHAPES = {  # width, feed-forward width, heads, key-value heads, blocks, vocabulary
    "tiny": (256, 704, 4, 2, 4, 512),
    "0.5b": (1280, 3456, 20, 4, 24, 32000),
    "1b": (2048, 5632, 16, 4, 24, 32768),
    "2b": (2560, 6912, 20, 4, 24, 49152),
    "8b": (4096, 14336, 32, 8, 32, 128256),
    "70b": (8192, 28672, 64, 8, 80, 128256),
}
SEED = 1


def write_model(folder: Path, shape: tuple[int, ...], blocks: int, device: str) -> int:
    """Write config.json, tokenizer and weights of a random Llama; returns the bytes of its weights."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

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
        files.setdefault(f"block-{int(block[1]):03}" if block else "ends", {})[name] = parameter.shape
    generator = torch.Generator(device).manual_seed(SEED)
    index, total = {}, 0
    for file, shapes in files.items():
        tensors = {}
        for name, size in shapes.items():
            scale = 0.5 / size[-1] ** 0.5 if len(size) > 1 else 0
            values = torch.empty(size, dtype=torch.bfloat16, device=device).normal_(
                0, max(scale, 1e-9), generator=generator
            )
            tensors[name] = (values if len(size) > 1 else torch.ones_like(values)).cpu()
            index[name] = f"{file}.safetensors"
            total += tensors[name].nbytes
        save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return total


def drop_page_cache() -> None:
    """Let the next reader go to the disk."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def ceilings(device: str, dtype: str, files: list[Path], cold: bool) -> dict:
    """FLOP/s of a matrix product, and bytes/s from blocks' files to the host's memory, four at a time."""
    import torch

    kind, size = getattr(torch, dtype), 8192 if device.startswith("cuda") else 2048
    one, other = (torch.randn(size, size, device=device, dtype=torch.float32).to(kind) for _ in range(2))

    def seconds(work) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            work()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def read(file: Path) -> int:
        part = bytearray(2**25)
        with file.open("rb", buffering=0) as content:
            while content.readinto(part):
                pass
        return file.stat().st_size

    def rate() -> float:
        if cold:
            drop_page_cache()
        start = time.perf_counter()
        with ThreadPoolExecutor(4) as threads:
            return sum(threads.map(read, files)) / (time.perf_counter() - start)

    return {
        "product_flops": 2 * size**3 / seconds(lambda: one @ other),
        "read_bytes_per_s": max(rate() for _ in range(3)),
    }


def by_part(steps: list[float], blocks: int) -> dict[str, float]:
    """Seconds of the parts of a pass, from the times at its start, after each block there and back, and at its end.

    Empty for a model that went through whole.
    """
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


def installed(*packages: str) -> dict[str, str | None]:
    """Package -> its version; None if it is here without its metadata."""
    found: dict[str, str | None] = dict.fromkeys(packages)
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def peak_gpu_bytes(figure: str) -> int | None:
    """The highest of all GPUs, of torch's peaks by this name; None without a GPU."""
    import torch

    peak = getattr(torch.cuda, f"max_memory_{figure}")
    return max((peak(number) for number in range(torch.cuda.device_count())), default=None)


def synchronize() -> None:
    """Wait for all GPUs."""
    import torch

    for number in range(torch.cuda.device_count()):
        torch.cuda.synchronize(number)


def digest(measured: tuple) -> str:
    """Of a sensitivity map and the Fisher information."""
    sensitivity, fisher = measured
    content = hashlib.sha256(sensitivity.model_dump_json().encode())
    for name, of_one in sorted(fisher.items()):
        content.update(name.encode() + of_one.rows.tobytes() + of_one.columns.tobytes())
    return content.hexdigest()


def measure(folder: Path, work: Path, arguments: argparse.Namespace, stages) -> tuple[dict, dict[str, Path]]:
    """Load the model, measure its sensitivities, and write GGUFs for the budgets; what that took, and the files."""
    import numpy as np
    from large_stages import peak_rss

    from samq.data.tokens import TokenBatch
    from samq.gguf.file import gguf_names
    from samq.sensitivity.blocks import Blocks
    from samq.sensitivity.checkpoint import describe_source
    from samq.sensitivity.hf_model import load_model
    from samq.sensitivity.layout import GgufLayout, weights_of
    from samq.sensitivity.loss import Labelling
    from samq.sensitivity.measure import Origin, measure_sensitivity
    from samq.sensitivity.memory import Memory, compute_device, compute_devices
    from samq.sensitivity.offloading import has_offloaded

    if arguments.whole:
        Blocks.of = lambda _: None  # type: ignore[method-assign,assignment]
    cuda, limit = compute_device(arguments.device).startswith("cuda"), arguments.limit
    devices = compute_devices(arguments.device)[: arguments.devices]
    before = peak_rss()
    with stages.of("load"):
        source = describe_source(folder)
        model, _ = load_model(source, arguments.dtype, arguments.device, memory_limit=limit)
    blocks = model.config.num_hidden_layers
    names = gguf_names({"general.architecture": "llama", "llama.block_count": blocks})
    random = np.random.default_rng(SEED)
    vocabulary = model.config.vocab_size
    tokens = TokenBatch(
        random.integers(0, vocabulary, (arguments.sequences, arguments.tokens), dtype=np.int32),
        np.full(arguments.sequences, arguments.tokens, dtype=np.int32),
    )
    layout, steps, figures = GgufLayout(weights_of(model, names)), list[float](), {}
    if arguments.budgets:
        from large_rounding import measure_rounding, prepare

        layout, figures["agreement"] = prepare(model, source, names, work / "full.gguf", arguments, stages)

    def run(sequences: int, devices: tuple):
        """The map and the Fisher information; `steps` are the seconds at the start, after each block, and at the end."""
        steps.clear()
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            sensitivity, fisher = measure_sensitivity(
                model,
                tokens.part(0, sequences),
                layout,
                Origin("", ""),
                labelling=Labelling("model", SEED),
                batch_size=arguments.batch_size,
                memory=Memory(limit, Path(scratch) / "going-on", devices),
                progress=lambda *_: steps.append(time.perf_counter() - started),
            )
            synchronize()
        steps.append(time.perf_counter() - started)
        return sensitivity, fisher

    if cuda and (len(devices) > 1 or not has_offloaded(model)):
        run(2 * len(devices), devices)  # loads CUDA's libraries
    os.sync()  # what the run itself has written goes to disk first, and not beside the pass
    if arguments.cold:
        drop_page_cache()
    with stages.of("gradients") if arguments.budgets else nullcontext():
        sensitivities, seconds = run(arguments.sequences, devices), steps[-1]
    in_blocks = sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.ndim == 2)
    head = model.lm_head.weight.numel()
    positions = arguments.sequences * arguments.tokens
    figures |= {
        "loss_nats": sensitivities[0].loss_nats,
        "blocks": blocks,
        "on_disk": has_offloaded(model),
        "weights": in_blocks + 2 * head,
        "weights_in_blocks": in_blocks,
        "weights_used": in_blocks + head,  # the embedding is looked up
        "load_s": stages.figures["load"]["seconds"],
        "seconds": seconds,
        **by_part(steps, blocks),
        "devices": len(devices),
        "flop": 6 * (in_blocks + head) * positions,
        "flops": 6 * (in_blocks + head) * positions / seconds,
        "bytes_read": 2 * in_blocks * 2,
        "bytes_per_s": 2 * in_blocks * 2 / seconds,
        "peak_gpu_bytes": peak_gpu_bytes("allocated"),
        "peak_gpu_reserved_bytes": peak_gpu_bytes("reserved"),
        "peak_rss_before_bytes": before,
        "peak_rss_bytes": peak_rss(),
    }
    if len(devices) > 1:
        if arguments.cold:
            drop_page_cache()
        alone = run(arguments.sequences, devices[:1])
        figures["several"] = {
            "speed_up": steps[-1] / seconds,
            "same_bits": digest(alone) == digest(sensitivities),
            "one_device": {"seconds": steps[-1], **by_part(steps, blocks)},
        }
    files = {}
    if arguments.budgets:
        memory = Memory(limit, devices=devices)
        files = measure_rounding(model, layout, tokens, sensitivities, work / "full.gguf", memory, arguments, stages)
    return figures, files


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="2b")
    parser.add_argument("--blocks", type=int, help="fewer than the shape has")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, or auto for all GPUs")
    parser.add_argument("--devices", type=int, help="that share the sequences; default: all that --device has")
    parser.add_argument("--memory-limit", help="of each device, as 22GiB; default: what is free")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="folder for the model")
    parser.add_argument(
        "--cold", action="store_true", help="read from the disk and not from the page cache (needs root)"
    )
    parser.add_argument(
        "--whole", action="store_true", help="take the model whole, as one that does not come apart, to compare"
    )
    parser.add_argument(
        "--budgets", nargs="*", default=[], help="write compensated GGUFs of these sizes, such as 4.5bpw"
    )
    parser.add_argument("--chunks", type=int, default=4, help="of 512 tokens that the GGUFs are evaluated on; 0: none")
    parser.add_argument("--types", nargs="+", default=list(DEFAULT_TYPES), help="that budgets choose from")
    parser.add_argument("--keep", action="store_true", help="leave the model there for another run")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()

    import torch
    import transformers
    from large_stages import Stages

    from samq.allocation.budget_notation import read_budget
    from samq.sensitivity.memory import compute_device

    device = compute_device(arguments.device)
    cuda = device.startswith("cuda")
    limit = arguments.limit = read_budget(arguments.memory_limit).bytes if arguments.memory_limit else None
    shape = SHAPES[arguments.shape]
    blocks = arguments.blocks or shape[4]
    folder = arguments.work / f"llama-{arguments.shape}-{blocks}"
    started = time.perf_counter()
    if not (folder / "model.safetensors.index.json").exists():
        write_model(folder, shape, blocks, device)
    written = time.perf_counter() - started
    files = [folder / f"block-{number:03}.safetensors" for number in range(min(4, blocks))]
    most = ceilings(device, arguments.dtype, files, arguments.cold)
    if cuda:
        torch.cuda.empty_cache()
        for number in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(number)
    work = folder.with_name(f"{folder.name}-work")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    stages = Stages([folder, work], cuda=cuda)
    measured, ggufs = measure(folder, work, arguments, stages)
    if ggufs:
        gc.collect()  # the torch model, before llama.cpp's
        if arguments.chunks:
            from large_evaluation import evaluate

            measured["evaluation"] = evaluate(work / "full.gguf", ggufs, arguments.chunks, limit, stages)
        measured["stages"] = stages.figures
        for figure in ("peak_gpu_bytes", "peak_device_bytes", "peak_rss_bytes", "disk_peak_bytes"):
            measured[f"{figure.removesuffix('_bytes')}_of_all_bytes"] = stages.most(figure)
        measured["seconds_of_all"] = sum(figures["seconds"] for figures in stages.figures.values())
    shutil.rmtree(work)
    if not arguments.keep:
        shutil.rmtree(folder)
    result = {
        "shape": arguments.shape,
        "blocks_of_shape": shape[4],
        "sequences": arguments.sequences,
        "tokens": arguments.tokens,
        "batch_size": arguments.batch_size,
        "dtype": arguments.dtype,
        "memory_limit_bytes": limit,
        "from_page_cache": not arguments.cold,
        "write_s": written,
        "ceilings": most,
        "measured": measured,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **installed("llama-cpp-python", "gguf", "safetensors", "numpy"),
            "python": sys.version.split()[0],
            "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        },
    }
    result |= bounds(measured, most, shape[4])
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


def bounds(measured: dict, most: dict, blocks_of_shape: int) -> dict[str, float]:
    """What the slower of both ceilings allows, and how near the run came: all of it, one block, and all blocks of the shape.

    The time of all blocks is a product: the run's, and that of one block there and back for each further block.
    """
    blocks, devices = measured["blocks"], measured["devices"]

    def bound(flop: float, read: float) -> float:
        read_s = read / most["read_bytes_per_s"] if measured["on_disk"] else 0.0
        return max(flop / most["product_flops"] / devices, read_s)

    flop_of_block = measured["flop"] * measured["weights_in_blocks"] / blocks / measured["weights_used"]
    read_of_block = measured["bytes_read"] / blocks
    more = blocks_of_shape - blocks
    block_s = measured["forward_block_s"] + measured["backward_block_s"] if "forward_block_s" in measured else None
    all_s = measured["seconds"] + more * (block_s or measured["seconds"] / blocks)
    result = {
        "bound_s": bound(measured["flop"], measured["bytes_read"]),
        "all_blocks_s": all_s,
        "all_blocks_share_of_bound": bound(
            measured["flop"] + more * flop_of_block, measured["bytes_read"] + more * read_of_block
        )
        / all_s,
        "share_of_products": measured["flops"] / most["product_flops"] / devices,
    }
    if block_s is not None:
        result["block_share_of_bound"] = bound(flop_of_block, read_of_block) / block_s
    return result | {"share_of_bound": result["bound_s"] / measured["seconds"]}


def show(result: dict) -> None:
    """Print the main figures."""
    measured, most = result["measured"], result["ceilings"]
    for label, value in (
        (
            "weights",
            f"{measured['weights'] / 1e9:.2f} billion, blocks {'on disk' if measured['on_disk'] else 'in memory'}",
        ),
        ("written in", f"{result['write_s']:.1f} s, loaded in {measured['load_s']:.1f} s"),
        ("seconds", f"{measured['seconds']:.1f}"),
        *(
            (f"... {name.removesuffix('_s')}", f"{value:.2f}")
            for name, value in measured.items()
            if "block_s" in name or name in ("forward_s", "backward_s")
        ),
        *(
            (label, f"{value:.2f}" if isinstance(value, float) else str(value))
            for label, value in (
                ("devices", measured["devices"]),
                *((f"... {key}", value) for key, value in measured.get("several", {}).items() if key != "one_device"),
            )
        ),
        ("rate", f"{measured['flops'] / 1e12:.2f} TFLOP/s of {most['product_flops'] / 1e12:.2f}"),
        ("reading", f"{measured['bytes_per_s'] / 1e9:.2f} GB/s of {most['read_bytes_per_s'] / 1e9:.2f}"),
        (
            "share of the bound",
            f"{result['share_of_bound']:.2f}, of a block {result.get('block_share_of_bound', 0):.2f}",
        ),
        (
            "all blocks of the shape",
            f"{result['all_blocks_s']:.0f} s (a product), {result['all_blocks_share_of_bound']:.2f} of the bound",
        ),
        ("peak of the GPU", f"{(measured['peak_gpu_bytes'] or 0) / 2**30:.2f} GiB"),
        (
            "peak of the process",
            f"{measured['peak_rss_bytes'] / 2**30:.2f} GiB, {measured['peak_rss_before_bytes'] / 2**30:.2f} before",
        ),
    ):
        print(f"{label:26} {value}", flush=True)


if __name__ == "__main__":
    main()
