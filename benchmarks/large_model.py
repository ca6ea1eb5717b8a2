"""Claims: gradients of a model far larger than the memory take little of it, and are near what the machine can compute or read.

    python benchmarks/large_model.py --shape 2b [--blocks N] [--device cpu] [--memory-limit 4GiB] [--json OUT.json]

A Llama with random weights of the shape is written to disk in bf16, a file a block (--work keeps it). Then the flow's
measurement of sensitivities runs on random tokens, with the model's blocks on disk if they do not fit the limit. The figures are
peak memory of the device and of the process, seconds, and the rates of arithmetic and of reading weights. They stand beside the
ceilings of both rates, which are measured in the same run. --blocks takes fewer blocks than the shape has; the time of all is a
product then. With --device auto, all GPUs share the sequences (or --devices of them). The pass then runs on one of them as well:
`several` has the speed-up, and whether the bits are the same.

With --budgets all stages run: full-precision GGUF, agreement of torch and llama.cpp, gradients, inputs of layers, prices, plans,
a compensated GGUF for each budget, the baseline's logits, and each GGUF's KL divergence (in llama.cpp, on a GPU if it was built
for one; with --memory-limit no more of the GPU is free). --blocks-compensated compensates the first blocks only.

With --compare-whole the pass runs twice, each time in a process of its own: with the blocks on disk, and with the model whole.

Exits 1 if a claim does not hold. Which claims are made depends on the run (large_claims.py):

- a GPU of 24 GB suffices for 70B, or under a limit of 20 GiB: the peak is under 22 GiB;
- from disk, gradients of all blocks reach half of the smaller bound (matrix products, or bytes/s from the files);
- of a model in a GPU's memory, they reach 40 % of the rate of matrix products;
- from disk on a processor, resident memory peaks at a quarter of the float32 weights and 1 GiB at most;
- from disk, the pass takes at most 1.3 times as long as with the model whole (--compare-whole).

Needs none of prefect, mlflow, datasets and lm-eval.
"""

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from conclusion import conclude, installed

DEFAULT_TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    from large_llama import SHAPES

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
    whole = parser.add_mutually_exclusive_group()
    whole.add_argument("--whole", action="store_true", help="take the model whole, as one that does not come apart")
    whole.add_argument(
        "--compare-whole", action="store_true", help="measure with the blocks on disk (needs --memory-limit) and whole"
    )
    parser.add_argument(
        "--budgets", nargs="*", default=[], help="write compensated GGUFs of these sizes, such as 4.5bpw"
    )
    parser.add_argument(
        "--blocks-compensated", type=int, help="round the tensors of all other blocks to the nearest values"
    )
    parser.add_argument("--chunks", type=int, default=4, help="of 512 tokens that the GGUFs are evaluated on; 0: none")
    parser.add_argument("--types", nargs="+", default=list(DEFAULT_TYPES), help="that budgets choose from")
    parser.add_argument("--keep", action="store_true", help="leave the model and its GGUFs in --work")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.compare_whole and (arguments.budgets or not arguments.memory_limit):
        parser.error("--compare-whole needs --memory-limit, and takes no --budgets")
    return arguments


def main() -> None:
    """Measure, print the figures, and write them as JSON."""
    arguments = parse_arguments()

    from large_claims import claims, show
    from large_llama import SHAPES

    shape = SHAPES[arguments.shape]
    arguments.blocks = arguments.blocks or shape[4]
    folder = arguments.work / f"llama-{arguments.shape}-{arguments.blocks}"
    try:
        if arguments.compare_whole:
            result, verdicts = compare(arguments)
        else:
            result = measure_one(folder, shape, arguments)
            show(result)
            verdicts = claims(result)
    finally:
        if not arguments.keep:
            for made in (folder, of_run(folder)):
                shutil.rmtree(made, ignore_errors=True)
    conclude(result, verdicts, arguments.json)


def of_run(folder: Path) -> Path:
    """The folder of the GGUFs that are made from the model in `folder`, and of what a run needs while it works."""
    return folder.with_name(f"{folder.name}-work")


def measure_one(folder: Path, shape: tuple[int, ...], arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run in this process; writes the model if it is not there."""
    import torch
    from large_ceilings import bounds, ceilings
    from large_llama import block_file, write_model
    from large_stages import Stages

    from samq.allocation.budget_notation import read_budget
    from samq.sensitivity.memory import compute_device

    device = compute_device(arguments.device)
    cuda = device.startswith("cuda")
    limit = arguments.limit = read_budget(arguments.memory_limit).bytes if arguments.memory_limit else None
    started = time.perf_counter()
    if not (folder / "model.safetensors.index.json").exists():
        write_model(folder, shape, arguments.blocks, device)
    written = time.perf_counter() - started
    files = [folder / block_file(number) for number in range(min(4, arguments.blocks))]
    most = ceilings(device, arguments.dtype, files, cold=arguments.cold)
    if cuda:
        torch.cuda.empty_cache()
    work = of_run(folder)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    measured = measure_stages(folder, work, arguments, Stages([folder, work], cuda=cuda))
    return {
        "shape": arguments.shape,
        "blocks_of_shape": shape[4],
        "sequences": arguments.sequences,
        "tokens": arguments.tokens,
        "batch_size": arguments.batch_size,
        "dtype": arguments.dtype,
        "device": device,
        "memory_limit_bytes": limit,
        "blocks_compensated": arguments.blocks_compensated,
        "from_page_cache": not arguments.cold,
        "write_s": written,
        "ceilings": most,
        "measured": measured,
        "versions": versions(),
        **bounds(measured, most, shape[4]),
    }


def measure_stages(folder: Path, work: Path, arguments: argparse.Namespace, stages: Any) -> dict[str, Any]:
    """The figures of all stages that the arguments ask for."""
    from large_gradients import measure

    measured, ggufs = measure(folder, work, arguments, stages)
    if ggufs and arguments.chunks:
        from large_evaluation import evaluate

        gc.collect()  # the torch model, before llama.cpp's
        measured["evaluation"] = evaluate(work / "full.gguf", ggufs, arguments.chunks, arguments.limit, stages)
    measured["stages"] = stages.figures
    for figure in ("peak_gpu_bytes", "peak_device_bytes", "peak_rss_bytes", "disk_peak_bytes"):
        measured[f"{figure.removesuffix('_bytes')}_of_all_bytes"] = stages.most(figure)
    measured["seconds_of_all"] = sum(figures["seconds"] for figures in stages.figures.values())
    return measured


def versions() -> dict[str, Any]:
    """Versions of Python and of what computes, and the GPUs."""
    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **installed("llama-cpp-python", "gguf", "safetensors", "numpy"),
        "python": sys.version.split()[0],
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }


def compare(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, bool]]:
    """One run with the blocks on disk and one with the model whole, in processes of their own: the figures, and the verdicts."""
    from large_claims import SLOWER

    of_both = "shape blocks sequences tokens batch_size dtype device devices work".split()
    options = [
        f"--{name.replace('_', '-')}={value}" for name in of_both if (value := getattr(arguments, name)) is not None
    ]
    options += ["--keep", *(["--cold"] if arguments.cold else [])]
    kinds = {"from disk": [f"--memory-limit={arguments.memory_limit}"], "whole": ["--whole"]}
    runs, verdicts = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, more in kinds.items():
            output = Path(folder) / "run.json"
            output.unlink(missing_ok=True)
            print(f"\n{kind}", flush=True)
            ended = subprocess.run([sys.executable, __file__, *options, *more, f"--json={output}"])
            if not output.exists():
                raise SystemExit(ended.returncode or 1)
            runs[kind] = json.loads(output.read_text())
            verdicts |= {f"{kind}: {claim}": holds for claim, holds in runs[kind]["verdicts"].items()}
    seconds = {kind: run["measured"]["seconds"] for kind, run in runs.items()}
    ratio = seconds["from disk"] / seconds["whole"]
    print(f"\n{'seconds from disk, whole':26} {seconds['from disk']:.1f}, {seconds['whole']:.1f}: ratio {ratio:.2f}")
    for kind, run in runs.items():
        if run["measured"]["on_disk"] is not (kind == "from disk"):
            raise SystemExit(
                f"the run {kind} has its blocks {'in memory' if kind == 'from disk' else 'on disk'}; change --memory-limit"
            )
    verdicts[f"from disk at most {SLOWER} times as long as whole"] = ratio <= SLOWER
    return {**runs, "ratio": ratio}, verdicts


if __name__ == "__main__":
    main()
