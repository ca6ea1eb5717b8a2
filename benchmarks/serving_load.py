"""Claims: `samq serve` answers 10,000 requests an hour from one GPU, loses none, and p99 between tokens stays under 100 ms.

    python benchmarks/serving_load.py --shape 8b --work FOLDER [--json OUT.json]     # on a GPU: full precision, uniform, mixed
    python benchmarks/serving_load.py --shape 8b --work FOLDER --types-of PLANNED.gguf --models plan
    python benchmarks/serving_load.py --gguf FILE.gguf [--rate 0.5] [--seconds 60]

Requests arrive at random (Poisson), 2.8 a second for 5 minutes, whether earlier ones are answered or not. Each has a prompt of
random tokens, which shares nothing with another, and gets an answer of a fixed length as a stream. With --shape the models are a
Llama of that shape with random weights: F16, uniform Q4_K_M, and a mixture. The mixture has Q8_0 in the first and the last two
blocks and Q4_K_M in the others. --types-of adds the model `plan`: its tensors have the types of those in that GGUF, which
`large_model.py --shape 8b --budgets 4.6bpw --keep` leaves behind. --most raises the rate, for --search-seconds each time, until
a request is refused or p99 between tokens is over the limit. Exits 1 if a claim does not hold at the given rate. Needs none of
prefect, mlflow, datasets and lm-eval.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from conclusion import conclude, installed
from gguf import GGUFReader, GGUFWriter

from samq.llamacpp.process import PROGRAM_TIMEOUT_S, run
from samq.llamacpp.toolchain import environment, find_toolchain, program

SHAPES = {  # width, feed-forward width, heads, key-value heads, blocks, vocabulary
    "tiny": (256, 768, 4, 2, 6, 1024),
    "8b": (4096, 14336, 32, 8, 32, 128256),
}
SENSITIVE_ENDS = 2  # blocks at each end that the mixture keeps in Q8_0
# Random weights may repeat one token, which the server refuses at its warm-up. So that is penalized, but not in the load.
UNREPEATED = {"repeat-penalty": 2.0}
LIMIT_S = 0.1
SEED = 1
NORMAL, CONTROL = 1, 3  # llama.cpp's types of tokens


def write_model(path: Path, shape: tuple[int, ...]) -> None:
    """Write a Llama of the shape in F16, with random weights and a vocabulary of ASCII tokens."""
    import torch

    width, inner, heads, kv_heads, blocks, vocabulary = shape
    writer = GGUFWriter(path, "llama")
    writer.add_name(path.stem)
    writer.add_context_length(8192)
    writer.add_embedding_length(width)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    letters = [chr(code) for code in range(33, 127)]
    writer.add_token_list([*letters, *(f"t{number}" for number in range(vocabulary - len(letters) - 1)), "<end>"])
    writer.add_token_types([NORMAL] * (vocabulary - 1) + [CONTROL])
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(vocabulary - 1)
    writer.add_bos_token_id(vocabulary - 1)
    kv = width // heads * kv_heads
    tensors = {"token_embd": (vocabulary, width), "output": (vocabulary, width), "output_norm": (width,)}
    for block in range(blocks):
        of_block = {"attn_norm": (width,), "ffn_norm": (width,), "attn_q": (width, width), "attn_k": (kv, width)}
        of_block |= {"attn_v": (kv, width), "attn_output": (width, width), "ffn_gate": (inner, width)}
        of_block |= {"ffn_up": (inner, width), "ffn_down": (width, inner)}
        tensors |= {f"blk.{block}.{name}": size for name, size in of_block.items()}
    for name, size in tensors.items():
        kind = np.dtype(np.float16 if len(size) > 1 else np.float32)
        writer.add_tensor_info(f"{name}.weight", size, kind, int(np.prod(size)) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(SEED)
    for size in tensors.values():
        if len(size) == 1:
            writer.write_tensor_data(np.ones(size, np.float32))
            continue
        values = torch.empty(size, dtype=torch.float16, device=device).normal_(
            0, 0.5 / size[1] ** 0.5, generator=generator
        )
        writer.write_tensor_data(values.cpu().numpy())
    writer.close()


def make_models(work: Path, shape: tuple[int, ...], planned: Path | None) -> dict[str, Path]:
    """The models of the article's table, and one with the types of a planned GGUF, by their names; keeps those that are there."""
    ends = [*range(SENSITIVE_ENDS), *range(shape[4] - SENSITIVE_ENDS, shape[4])]
    types = {"uniform-Q4_K_M": {}, "mixed-Q8_0-Q4_K_M": {f"blk\\.{block}\\..*weight": "q8_0" for block in ends}}
    if planned:
        matrices = [tensor for tensor in GGUFReader(planned).tensors if len(tensor.shape) > 1]
        types["plan"] = {re.escape(tensor.name): tensor.tensor_type.name.lower() for tensor in matrices}
    files = {name: work / f"{name}.gguf" for name in ("F16", *types)}
    if not files["F16"].exists():
        write_model(files["F16"], shape)
    toolchain = find_toolchain()
    for name, of_tensors in types.items():
        if not files[name].exists():
            patterns = work / "types.txt"
            patterns.write_text("".join(f"^{pattern}$={kind}\n" for pattern, kind in of_tensors.items()))
            flags = ["--tensor-type-file", patterns] if of_tensors else []
            command = [program(toolchain, "llama-quantize"), *flags, files["F16"], files[name], "Q4_K_M"]
            run(command, log=work / "quantize.log", timeout_s=PROGRAM_TIMEOUT_S, env=environment(toolchain))
    return files


@contextmanager
def served(gguf: Path, settings: dict[str, Any]) -> Iterator[int]:
    """Serve the file by `samq serve` until the end of the `with`; yields the port when it is ready."""
    with tempfile.TemporaryDirectory() as folder:
        config, log = Path(folder) / "serving.yaml", Path(folder) / "log.txt"
        config.write_text(json.dumps(settings))  # JSON is YAML
        command = [sys.executable, "-m", "samq.cli", "serve", str(gguf), "--config", str(config)]
        with log.open("w") as output:
            server = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            while not is_ready(settings["port"]):
                if server.poll() is not None or "is not served" in log.read_text():
                    raise SystemExit(f"samq serve does not serve {gguf}:\n{log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield settings["port"]
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()


def is_ready(port: int) -> bool:
    """Whether a server answers on the port and has its model."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200
    except httpx.TransportError:
        return False


def normal_tokens(gguf: Path) -> list[int]:
    """The ids of the tokens that are text."""
    types = GGUFReader(gguf).fields["tokenizer.ggml.token_type"]
    return [number for number, part in enumerate(types.data) if types.parts[part][0] == NORMAL]


async def ask(port: int, prompt: list[int], tokens: int) -> dict[str, Any]:
    """Status, seconds to the first token, and seconds between tokens of a request over a connection of its own."""
    fields = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    fields["repeat_penalty"] = 1.0
    body = json.dumps(fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    start = time.perf_counter()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + body)
        status, arrivals, done = int((await reader.readline()).split()[1]), [], False
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                done = True
            elif line.startswith(b"data: "):
                arrivals.append(time.perf_counter())
        writer.close()
    except (OSError, IndexError, ValueError) as error:
        return {"status": f"lost: {type(error).__name__}"}
    if status == 200 and not (done and len(arrivals) >= tokens):
        return {"status": f"broken after {len(arrivals)} tokens"}
    gaps = [after - before for before, after in pairwise(arrivals)]
    first = arrivals[0] - start if arrivals else None
    return {"status": str(status), "first_s": first, "gaps_s": gaps, "end_s": time.perf_counter() - start}


async def arrive(
    port: int, rate: float, seconds: float, ids: list[int], prompt: int, answer: int
) -> list[dict[str, Any]]:
    """Requests at random times; what each of them got."""
    chance = random.Random(f"{SEED} {rate} {time.time()}")
    start, due, requests = time.perf_counter(), 0.0, []
    while (due := due + chance.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        requests.append(asyncio.create_task(ask(port, chance.choices(ids, k=prompt), answer)))
    return list(await asyncio.gather(*requests))


def measure(port: int, rate: float, seconds: float, ids: list[int], lengths: tuple[int, int]) -> dict[str, Any]:
    """What the requests of some time at a rate got, in one row."""
    start = time.perf_counter()
    answers = asyncio.run(arrive(port, rate, seconds, ids, *lengths))
    took = time.perf_counter() - start
    good = [answer for answer in answers if answer["status"] == "200"]
    gaps = np.array([gap for answer in good for gap in answer["gaps_s"]] or [np.nan])
    firsts, ends = (np.array([answer[what] for answer in good] or [np.nan]) for what in ("first_s", "end_s"))
    statuses = sorted(answer["status"] for answer in answers)
    row = {
        "requests_per_hour": 3600 * rate,
        "seconds": seconds,
        "requests": len(answers),
        "statuses": {status: statuses.count(status) for status in dict.fromkeys(statuses)},
        "lost": len(answers) - len(good),
        "between_tokens_s": {"p50": float(np.percentile(gaps, 50)), "p99": float(np.percentile(gaps, 99))},
        "first_token_s": {"p50": float(np.percentile(firsts, 50)), "p99": float(np.percentile(firsts, 99))},
        "answer_s": {"p50": float(np.percentile(ends, 50)), "p99": float(np.percentile(ends, 99))},
        "tokens_per_s": len(good) * lengths[1] / took,
    }
    print(
        f"{row['requests_per_hour']:10.0f} {row['requests']:9} {row['lost']:5} {1e3 * row['between_tokens_s']['p50']:9.1f} "
        f"{1e3 * row['between_tokens_s']['p99']:9.1f} {1e3 * row['first_token_s']['p50']:9.0f} "
        f"{1e3 * row['first_token_s']['p99']:9.0f} {row['tokens_per_s']:9.0f}",
        flush=True,
    )
    return row


def keeps(row: dict[str, Any]) -> bool:
    """Whether no request was lost, and p99 between tokens was under the limit."""
    return row["lost"] == 0 and row["between_tokens_s"]["p99"] < LIMIT_S


def search(port: int, rate: float, seconds: float, ids: list[int], lengths: tuple[int, int]) -> list[dict[str, Any]]:
    """Rows at rising rates: doubled until one does not keep the limit, then two between."""
    rows, low = [], rate
    while keeps(row := measure(port, 2 * low, seconds, ids, lengths)):
        rows.append(row)
        low *= 2
    rows.append(row)
    high = 2 * low
    for _ in range(2):
        middle = (low + high) / 2
        rows.append(measure(port, middle, seconds, ids, lengths))
        low, high = (middle, high) if keeps(rows[-1]) else (low, middle)
    return rows


def main() -> None:
    """Print a table for each model and a verdict on every claim, and write them as JSON; exits 1 if one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument("--gguf", type=Path, nargs="+")
    models.add_argument("--shape", choices=SHAPES, help="of generated models")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="folder for generated models")
    parser.add_argument("--types-of", type=Path, help="a GGUF of that shape, for the model `plan`")
    parser.add_argument("--only-make", action="store_true", help="generate the models, and measure nothing")
    parser.add_argument("--models", nargs="+", help="some of the generated models, by their names")
    parser.add_argument("--rate", type=float, default=10000 / 3600, help="requests a second")
    parser.add_argument("--seconds", type=float, default=300, help="that requests arrive for")
    parser.add_argument(
        "--most", action="store_true", help="find the most requests an hour that keep the limit as well"
    )
    parser.add_argument("--search-seconds", type=float, default=45)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--port", type=int, default=8181)
    parser.add_argument("--flags", type=json.loads, default={}, help="more flags of llama-server, as JSON")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.shape:
        arguments.work.mkdir(parents=True, exist_ok=True)
        files = make_models(arguments.work, SHAPES[arguments.shape], arguments.types_of)
    else:
        files = {gguf.stem: gguf for gguf in arguments.gguf}
    if arguments.only_make:
        return
    lengths = arguments.prompt_tokens, arguments.answer_tokens
    settings = {
        "port": arguments.port,
        "slots": arguments.slots,
        "context_tokens": sum(lengths) + 16,
        "queue_size": arguments.slots,
        "engine_flags": UNREPEATED | arguments.flags,
    }
    results, verdicts = {}, {}
    for name in arguments.models or files:
        print(f"\n{name}, {files[name].stat().st_size / 1e9:.2f} GB")
        print("requests/h  requests  lost   between  p99 (ms)     first  p99 (ms)  tokens/s")
        ids = normal_tokens(files[name])
        with served(files[name], settings) as port:
            measure(port, arguments.rate, 3 / arguments.rate, ids, lengths)  # warms it up
            row = measure(port, arguments.rate, arguments.seconds, ids, lengths)
            more = search(port, arguments.rate, arguments.search_seconds, ids, lengths) if arguments.most else []
        most = max((one["requests_per_hour"] for one in [row, *more] if keeps(one)), default=None)
        results[name] = {
            "bytes": files[name].stat().st_size,
            "row": row,
            "search": more,
            "most_requests_per_hour": most,
        }
        verdicts[f"{name}: no request lost"] = row["lost"] == 0
        verdicts[f"{name}: at no rate any answer but a whole one or a 429"] = all(
            set(one["statuses"]) <= {"200", "429"} for one in [row, *more]
        )
        verdicts[f"{name}: p99 between tokens under {1e3 * LIMIT_S:.0f} ms"] = row["between_tokens_s"]["p99"] < LIMIT_S
    packages = ("llama-cpp-python", "numpy", "starlette", "uvicorn", "aiohttp")
    versions = installed(*packages) | {"llama.cpp build": find_toolchain().build}
    given = {name: value for name, value in vars(arguments).items() if isinstance(value, int | float | str | dict)}
    conclude({"models": results, "arguments": given, "versions": versions}, verdicts, arguments.json)


if __name__ == "__main__":
    main()
