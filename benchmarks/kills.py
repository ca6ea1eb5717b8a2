"""Claim: a run that is killed goes on at the block where it was, and gives the same bytes.

    python benchmarks/kills.py [--kills 20] [--seed 0] [--json OUT.json]

The flow's stages calibrate, layer_inputs, price, plan and compensate run on a small Llama with random weights, whose blocks
stay on disk. A process of its own runs them, so that it can be killed. First it runs undisturbed. Then it runs again from
nothing, gets SIGKILL at a random moment, and a second process goes on: --kills times. At last one run from nothing is killed
--kills times, each time soon after it has gone on.

The files are the sensitivity map, the Fisher information, the importance matrix, prices, plans and GGUFs. `Residence` logs each
block that it brings into memory to be computed, from which the script counts. A pass is one direction through all blocks:
calibrate has a forward and a backward one. A block that a kill interrupts counts, and counts again when the next process runs it.
A kill costs at most two blocks: the one at work, and the one before if its output was not on disk yet.
"""

import argparse
import json
import logging
import multiprocessing
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from bench import keep
from large_llama import write_model
from large_rounding import write_gguf
from setting import conclude

from samq.allocation.budget import BudgetPolicy
from samq.data.tokens import TokenBatch
from samq.files import CALIBRATION_SET_NAME, GGUF_NAME, TOKENS_NAME
from samq.llamacpp.toolchain import find_toolchain
from samq.records import CalibrationSet
from samq.sensitivity.checkpoint import describe_source
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.calibrate import Passes, calibrate
from tasks.compensate import compensate
from tasks.layer_inputs import InputText, layer_inputs
from tasks.model import TorchModel
from tasks.plan import plan_budget
from tasks.price import choose_types, price, price_compensated
from tasks.target import Target
from tasks.text import FirstSequences

SHAPE = (256, 512, 4, 2, 8, 512)  # width, feed-forward width, heads, key-value heads, blocks, vocabulary
BLOCKS = SHAPE[4]
TYPES = ["Q4_K", "Q6_K", "Q8_0"]
BUDGETS = ["5bpw", "6bpw"]
MEMORY_LIMIT = 1  # bytes: no block fits beside what is around the blocks
PASSES = ["forward", "backward", "inputs", "compensate"]
TURN = "turn"  # the part after the last block, between forward and backward; the part before the first block has the next number
MOST = 2  # times that a block is computed in a pass, with one kill
Computed = Counter[tuple[str, int]]  # (pass, block) -> how often
BLOCK_RUNS = re.compile(r"part (\d+) runs, then part (-?\d+|None)")
logger = logging.getLogger("samq.kills")


def main() -> None:
    """Measure, print a line a run, and write all as JSON."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        result, verdicts = measure(Path(folder), arguments)
    conclude(result, verdicts, arguments.json)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="runs that are killed once, and kills of the last run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, the weights are always the same")
    parser.add_argument("--sequences", type=int, default=16, help="calibration sequences")
    parser.add_argument("--tokens", type=int, default=128, help="tokens a sequence")
    parser.add_argument("--work", type=Path, help="folder for model and stores; default: the system's")
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def measure(folder: Path, arguments: argparse.Namespace) -> tuple[dict, dict[str, bool]]:
    """The figures, and claim -> whether it holds."""
    model, moments = folder / "model", random.Random(arguments.seed)
    attempt(lambda: write_source(model, arguments.sequences, arguments.tokens))
    undisturbed = Run(folder / "undisturbed", model)
    seconds = undisturbed.go()
    assert seconds is not None, "nobody kills it"
    expected, computed, start_s = undisturbed.files(), undisturbed.computed(), undisturbed.first_block_s()
    print(f"undisturbed: {seconds:.1f} s, {len(expected)} files, {computed.total()} times a block", flush=True)
    once: list[dict] = []
    while sum(run["killed"] for run in once) < arguments.kills:  # a run may end before it is killed
        once.append(killed_once(folder, model, moments.uniform(0, seconds), expected))
    short = seconds / max(arguments.kills, 1) / 2
    delays_s = [start_s + moments.uniform(0, 2 * short) for _ in range(arguments.kills)]
    often = killed_often(folder, model, delays_s, expected)
    verdicts = {
        "undisturbed, each pass computes each block once": computed
        == Counter([(TURN, BLOCKS), *((way, block) for way in PASSES for block in range(BLOCKS))]),
        "killed once, the same bytes": all(run["same_bytes"] for run in once),
        f"killed once, no pass computes a block more than {MOST} times": all(run["most"] <= MOST for run in once),
        "killed again and again, the same bytes": often["same_bytes"],
        "a kill costs two blocks at most": often["computed_again"] <= 2 * often["kills"],
    }
    result = {
        "seed": arguments.seed,
        "shape": SHAPE,
        "sequences": arguments.sequences,
        "tokens": arguments.tokens,
        "memory_limit_bytes": MEMORY_LIMIT,
        "undisturbed_s": seconds,
        "sha256": expected,
        "killed_once": once,
        "killed_often": often,
    }
    return result, verdicts


def killed_once(folder: Path, model: Path, after_s: float, expected: dict[str, str]) -> dict:
    """A run from nothing that is killed after so many seconds, and goes on."""
    run = Run(folder / "killed", model)
    ended = run.go(after_s) is not None
    where = run.where()
    if not ended:
        run.go()
    computed = run.computed()
    again = sorted(f"{way} {block}" for (way, block), count in computed.items() if count > 1)
    same, most = run.files() == expected, max(computed.values())
    what = "ended before" if ended else f"in {where}"
    print(
        f"killed after {after_s:5.2f} s, {what}: {'the same' if same else 'OTHER'} bytes, again: {', '.join(again)}",
        flush=True,
    )
    return {
        "after_s": after_s,
        "killed": not ended,
        "at": where,
        "computed_again": again,
        "most": most,
        "same_bytes": same,
    }


def killed_often(folder: Path, model: Path, delays_s: Iterable[float], expected: dict[str, str]) -> dict:
    """A run from nothing that is killed after the first delay, after the second from its next start, and so on; then it ends."""
    run, kills = Run(folder / "killed", model), 0
    for delay in delays_s:
        if run.go(delay) is not None:
            break
        kills += 1
    else:
        run.go()
    computed = run.computed()
    again, same = computed.total() - len(computed), run.files() == expected
    print(f"one run, {kills} kills: {'the same' if same else 'OTHER'} bytes, {again} times a block again", flush=True)
    return {
        "kills": kills,
        "computed_again": again,
        "most": max(computed.values()),
        "same_bytes": same,
    }


class Run:
    """A run of the stages in a store of its own, in one process after another; the processes append to a log."""

    def __init__(self, folder: Path, model: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self.folder, self.model, self._started = folder, model, time.time()
        self._log, self._files = folder / "run.log", folder / "files.json"

    def go(self, kill_after_s: float | None = None) -> float | None:
        """Start a process, or go on in a new one; the seconds it took to end, or None if it was killed before."""
        return attempt(lambda: run_stages(self.folder / "store", self.model, self._log, self._files), kill_after_s)

    def files(self) -> dict[str, str]:
        """Stage and name of each file -> SHA-256."""
        return json.loads(self._files.read_text())

    def computed(self) -> Computed:
        """How often each block was computed in each pass."""
        return Counter(computed_in(message for _, message in self._logged()))

    def first_block_s(self) -> float:
        """Seconds from the start of the first process to the first block that it computed."""
        return next(at for at, message in self._logged() if computed_in([message])) - self._started

    def where(self) -> str:
        """The stage that the last process was in, and the block if that was one's turn."""
        messages = [message for _, message in self._logged()]
        stages = [message for message in messages if message.startswith("stage ")]
        computed = computed_in(messages) if messages and computed_in(messages[-1:]) else []
        return "{} {}".format(*computed[-1]) if computed else stages[-1] if stages else "start"

    def _logged(self) -> list[tuple[float, str]]:
        """Time and text of each message."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [(float(at), message) for at, message in (line.split(" ", 1) for line in lines)]


def attempt(work: Callable[[], object], kill_after_s: float | None = None) -> float | None:
    """Do the work in a child process; the seconds it took, or None if it was killed before its end.

    The child is a fork of this process, which computes nothing itself: torch must not have started threads in it.
    """
    started = time.perf_counter()
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(kill_after_s)
    if child.exitcode is None:
        child.kill()
        child.join()
        return None
    if child.exitcode:
        raise SystemExit(f"a run failed with exit status {child.exitcode}")
    return time.perf_counter() - started


def write_source(folder: Path, sequences: int, tokens: int) -> None:
    """The model as Hugging Face has it and as a GGUF, and random sequences."""
    write_model(folder, SHAPE, BLOCKS, "cpu")
    write_gguf(folder, folder / GGUF_NAME)
    ids = np.random.default_rng(0).integers(0, SHAPE[-1], (sequences, tokens), dtype=np.int32)
    TokenBatch(ids, np.full(sequences, tokens, np.int32)).save(folder / TOKENS_NAME)


def run_stages(store: Path, folder: Path, log: Path, files: Path) -> None:
    """All stages, as the flow runs them; `files` gets the SHA-256 of what they make."""
    follow(log)
    at = Workspace(store, find_toolchain(), device="cpu", memory_limit=MEMORY_LIMIT)
    full = keep(store, "convert", "full", lambda place: shutil.copy(folder / GGUF_NAME, place))
    tokens = keep(store, "tokenize", "random", lambda place: write_tokens(folder, place))
    count = len(TokenBatch.load(tokens.path(TOKENS_NAME)))
    model, text = TorchModel(describe_source(folder), full), InputText(tokens, count, 2**20, 4)
    logger.info("stage calibrate")
    sensitivities = calibrate(at, model, FirstSequences(tokens, count), None, Passes(batch_size=4))
    logger.info("stage inputs")
    inputs = layer_inputs(at, model, text, True)
    logger.info("stage price")
    target = Target(full, inputs)
    nearest = price(at, target, choose_types(at, target, TYPES), sensitivities, "Q8_0")
    prices = price_compensated(at, nearest, inputs)
    plans = {budget: plan_budget(at, target, prices, budget, BudgetPolicy()) for budget in BUDGETS}
    logger.info("stage compensate")
    built = compensate(at, model, text, inputs, plans, {})
    partial = files.with_suffix(".partial")
    partial.write_text(json.dumps(hashes([sensitivities, inputs, nearest, prices, *plans.values(), built])))
    partial.replace(files)


def follow(log: Path) -> None:
    """Append what SAMQ logs to a file, line by line, and to nothing else."""
    handler, samq = logging.FileHandler(log), logging.getLogger("samq")
    handler.setFormatter(logging.Formatter("%(created).3f %(message)s"))
    samq.handlers, samq.propagate = [handler], False
    samq.setLevel(logging.DEBUG)


def write_tokens(folder: Path, place: Path) -> None:
    """The sequences as the stage `tokenize` keeps them."""
    tokens = TokenBatch.load(folder / TOKENS_NAME)
    tokens.save(place / TOKENS_NAME)
    CalibrationSet(
        dataset="random",
        samples=len(tokens),
        sequence_tokens=int(tokens.lengths.max()),
        tokens=int(tokens.lengths.sum()),
        seed=0,
        tokens_digest=tokens.digest(),
    ).save(place / CALIBRATION_SET_NAME)


def hashes(artifacts: Iterable[Artifact]) -> dict[str, str]:
    """Stage, plan and name of each file -> SHA-256; logs apart."""
    return {
        f"{artifact.stage}/{artifact.key[:8]}/{name}": entry.sha256
        for artifact in artifacts
        for name, entry in artifact.files.items()
        if not name.endswith(".log")
    }


def computed_in(lines: Iterable[str]) -> list[tuple[str, int]]:
    """The (pass, block) of each time that a block was computed."""
    stage, computed = "", []
    for line in lines:
        if line.startswith("stage "):
            stage = line.removeprefix("stage ")
        elif run := BLOCK_RUNS.fullmatch(line):
            block = int(run[1])
            if block < BLOCKS:
                way = "forward" if stage == "calibrate" and int(run[2]) > block else "backward"
                computed.append((way if stage == "calibrate" else stage, block))
            elif block == BLOCKS and stage == "calibrate":
                computed.append((TURN, block))
    return computed


if __name__ == "__main__":
    main()
