"""Claim: llama.cpp's own rounding of activations is a share of every measured KLD that no choice of types can change.

On a CPU llama.cpp multiplies quantized weights by activations that it rounds to 8 bits. This script measures each plan's
KLD with llama.cpp, as the evaluation does, and with torch, which multiplies the same dequantized weights by float32
activations: same tokens, same bytes. The difference is the share of that rounding. It is about the same for every plan, so
it matters most for the best plans. Takes the arguments of quality.py except --bits, --seeds and --repeats, and shares its
--work folder.
"""

import json
from pathlib import Path

import numpy as np
import torch
from bench import hf_folder, open_bench, parser
from quality import MIXTURES
from setting import machine, versions

from samq.allocation.target import stock_plan
from samq.files import GGUF_NAME
from samq.progress import bar
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.hf_model import load_model


def main() -> None:
    """Print a table and write it as JSON."""
    arguments = parser(__doc__ or "").parse_args()
    bench = open_bench(arguments)
    first = bench.parameters.evaluation.first_scored
    exact = torch_logits(arguments.gguf, hf_folder(arguments), bench.chunks, first)
    rows = []
    for mixture in MIXTURES:
        stock = stock_plan(bench.target, mixture)
        plan = bench.at_bytes(stock.tensor_bytes, bench.compensated, f"size-of:{mixture}")
        row: dict[str, object] = {"mixture": mixture}
        for name, candidate in (("stock", stock), ("samq", plan)):
            gguf = bench.build(candidate).path(GGUF_NAME)
            logits = torch_logits(gguf, hf_folder(arguments), bench.chunks, first)
            row[f"{name}_llama_cpp"] = float(bench.measure(candidate)["kld"].mean())
            row[f"{name}_torch"] = divergence(exact, logits)
        rows.append(row)
        print(
            f"{mixture:7}"
            + "".join(
                f"  {how}: {row[f'stock_{key}']:.6f} -> {row[f'samq_{key}']:.6f} "
                f"({row[f'samq_{key}'] / row[f'stock_{key}'] - 1:+.1%})"
                for how, key in (("llama.cpp", "llama_cpp"), ("float32 activations", "torch"))
            ),
            flush=True,
        )
    if arguments.json:
        result = {
            "rows": rows,
            "seed": arguments.seed,
            "heldout_tokens": bench.heldout_tokens,
            "versions": versions(),
            "machine": machine(),
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def torch_logits(gguf: Path, hf_folder: Path | None, chunks: np.ndarray, first: int) -> torch.Tensor:
    """Log-probabilities of the scored positions, (chunks, positions, vocabulary), from dequantized weights in float32."""
    model, _ = load_model(describe_source(gguf, hf_folder=hf_folder), device="cpu")
    log_probabilities = []
    with torch.inference_mode(), bar(f"torch on {gguf.name}") as progress:
        for number, chunk in enumerate(chunks, 1):
            logits = model(torch.from_numpy(chunk[None].astype(np.int64))).logits[0, first:-1]
            log_probabilities.append(logits.log_softmax(-1))
            progress(number, len(chunks))
    return torch.stack(log_probabilities)


def divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL divergence in nats per token."""
    return float(np.mean([(p.exp() * (p - q)).sum(-1).double().mean() for p, q in zip(exact, other, strict=True)]))


if __name__ == "__main__":
    main()
