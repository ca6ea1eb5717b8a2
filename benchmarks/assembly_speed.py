"""Claim: assembling a plan's GGUF from the ladder takes at most 1.3 times as long as `cp` of the result.

The plan changes the type at every tensor, so that no two neighbours come from one rung. Both write to the same folder. The
time includes flushing the file to disk; the file is removed between runs. The audit and the SHA-256 are timed separately.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from setting import machine, versions

from samq.allocation.ladder import Ladder, make_rung, uniform_plan
from samq.allocation.target import OpenTarget
from samq.llamacpp.programs import planned_bytes
from samq.llamacpp.toolchain import find_toolchain
from samq.quantization.assembly import assemble, write_assembled

LIMIT = 1.3
TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0")


def timed(path: Path, write: Callable[[], object]) -> float:
    """Seconds until `path` is written and on disk; removes the file first."""
    path.unlink(missing_ok=True)
    os.sync()
    start = time.perf_counter()
    write()
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    return time.perf_counter() - start


def main() -> None:
    """Print a table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, default=Path("../shared/models/code-46m/model-f16.gguf"))
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    target = OpenTarget.open(arguments.gguf, find_toolchain())
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        rungs = {}
        for name in TYPES:
            (folder / name).mkdir()
            rungs[name] = folder / name / make_rung(target, name, folder / name, provenance={}).file
        ladder = Ladder(target.full.path, rungs)
        sources = ladder.sources()
        types = {}
        for index, name in enumerate(target.quantizable):
            available = list(sources[name])
            types[name] = available[index % len(available)]
        plan = uniform_plan(target, "Q4_K").model_copy(
            update={"types": types, "tensor_bytes": planned_bytes(target.tensors, types)}
        )
        (folder / "out").mkdir()
        start = time.perf_counter()
        model = assemble(ladder, plan, folder / "out", provenance={})
        seconds_in_all = time.perf_counter() - start
        result, copy = folder / "out" / model.file, folder / "copy.gguf"
        cp_seconds, assembly_seconds = [], []
        for _ in range(arguments.runs):
            cp_seconds.append(timed(copy, lambda: subprocess.run(["cp", "--reflink=never", result, copy], check=True)))
            assembly_seconds.append(timed(copy, lambda: write_assembled(ladder, plan, copy, model.metadata)))
        shutil.rmtree(folder / "out")
    row = {
        "file_bytes": model.file_bytes,
        "cp_seconds": median(cp_seconds),
        "assembly_seconds": median(assembly_seconds),
        "ratio": median(assembly_seconds) / median(cp_seconds),
        "with_audit_and_sha256_seconds": seconds_in_all,
    }
    for name, value in row.items():
        print(f"{name:32} {value:,.3f}")
    print(f"limit of the ratio: {LIMIT:g}")
    if arguments.json:
        result = {**row, "runs": arguments.runs, "versions": versions(), "machine": machine()}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if row["ratio"] > LIMIT:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
