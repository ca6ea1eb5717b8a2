"""`samq quantize`, `samq compensate` and `samq inspect`."""

import re
import resource
import subprocess
import sysconfig
from pathlib import Path

import gguf as gguf_package
import pytest

from samq.allocation.target import OpenTarget, stock_plan
from samq.gguf.file import file_sha256, read_tensors
from samq.llamacpp.convert import convert
from samq.records import Plan
from samq.sensitivity.checkpoint import describe_source
from tests.architectures.models import write_model
from tests.command_line import refused
from tests.command_line import samq as samq_process
from tests.conftest import write_tiny_gguf


def test_a_missing_input_of_quantize_is_refused(samq, tmp_path, gguf, plan):
    arguments = ("quantize", "--plan", plan, "--out", tmp_path / "out.gguf", "--gguf")
    assert refused(samq(*arguments, tmp_path / "nothing.gguf"), "there is no GGUF file at")
    done = samq(*arguments, gguf, "--imatrix", tmp_path / "nothing.imatrix")
    assert refused(done, "nothing.imatrix: No such file")


def test_a_plan_is_quantized_with_its_own_importance_matrix_or_none(samq, tmp_path, gguf, plan):
    own, other = tmp_path / "own.imatrix", tmp_path / "other.imatrix"
    own.write_text("own")
    other.write_text("other")
    weighted = Plan.load(plan).model_copy(update={"imatrix_sha256": file_sha256(own)}).save(tmp_path / "weighted.json")

    def quantize(plan, *arguments):
        return samq("quantize", "--gguf", gguf, "--plan", plan, "--out", tmp_path / "out.gguf", *arguments)

    own_hash, other_hash = file_sha256(own)[:12], file_sha256(other)[:12]
    assert refused(quantize(weighted), f"was made with importance matrix {own_hash} and none is given")
    assert refused(
        quantize(weighted, "--imatrix", other), f"with importance matrix {own_hash} and {other_hash} is given"
    )
    assert refused(quantize(plan, "--imatrix", own), f"was made without importance matrix and {own_hash} is given")
    assert not (tmp_path / "out.gguf").exists()


def test_llama_quantize_does_not_get_a_plan_of_compensated_rounding(samq, tmp_path, gguf, plan):
    compensated = Plan.load(plan).model_copy(update={"rounding": "compensated"}).save(tmp_path / "compensated.json")
    done = samq("quantize", "--gguf", gguf, "--plan", compensated, "--out", tmp_path / "out.gguf")
    assert refused(done, "compensated.json is a plan of compensated rounding")
    assert "`samq compensate`" in done.stderr
    assert not (tmp_path / "out.gguf").exists()


def test_an_output_that_cannot_be_written_is_refused_before_the_work(samq, tmp_path, gguf, plan):
    arguments = ("quantize", "--gguf", gguf, "--plan", plan, "--out")
    assert refused(samq(*arguments, tmp_path / "no" / "out.gguf"), "the folder of")
    assert refused(samq(*arguments, "/proc/out.gguf"), "/proc cannot be written to")
    assert refused(samq(*arguments, tmp_path), "is a folder; name a file in it")


def test_a_read_only_output_folder_is_refused_before_the_work(samq, gguf, plan, disk):
    disk.make_read_only()
    done = samq("quantize", "--gguf", gguf, "--plan", plan, "--out", disk.folder / "out.gguf")
    assert refused(done, "disk cannot be written to (Read-only file system)")


def test_a_full_output_folder_is_refused_and_gets_no_half_file(samq, gguf, plan, disk):
    disk.fill()
    done = samq("quantize", "--gguf", gguf, "--plan", plan, "--out", disk.folder / "out.gguf")
    assert refused(done, "has 0 bytes free and Q4_K_M needs")
    assert [path.name for path in disk.folder.iterdir()] == ["filling"]


def test_an_output_that_cannot_grow_gets_no_half_file(tmp_path, gguf, plan):
    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    arguments = ("quantize", "--gguf", gguf, "--plan", plan, "--out", tmp_path / "out" / "out.gguf")
    (tmp_path / "out").mkdir()
    done = samq_process(*arguments, home=tmp_path, preexec_fn=limit_file_size)
    assert refused(done, "llama-quantize was killed by signal 25 (File size limit exceeded)")
    (log,) = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert f"(log: {log})" in done.stderr


def test_a_plan_for_another_file_is_refused(samq, tmp_path, plan):
    other = write_tiny_gguf(tmp_path / "other.gguf", seed=1)
    done = samq("quantize", "--gguf", other, "--plan", plan, "--out", tmp_path / "o.gguf")
    assert refused(done, "is a plan for another file")


def test_a_quantized_file_of_another_model_is_not_compensated(samq, tmp_path, gguf, plan):
    quantized, other = tmp_path / "q4.gguf", write_tiny_gguf(tmp_path / "other.gguf", seed=1)
    assert samq("quantize", "--gguf", gguf, "--plan", plan, "--out", quantized).returncode == 0
    done = samq("compensate", quantized, "--gguf", other, "--out", tmp_path / "out.gguf")
    assert refused(done, f"q4.gguf was not made from {other}: output.weight (Q6_K) has a squared error of")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.slow
def test_a_gguf_that_transformers_cannot_read_is_compensated_with_its_folder(samq, tmp_path, toolchain):
    folder, quantized, out = write_model("Gemma", tmp_path / "tiny"), tmp_path / "q4.gguf", tmp_path / "out.gguf"
    (tmp_path / "full").mkdir()
    full = convert(describe_source(folder), tmp_path / "full", toolchain)
    plan = stock_plan(OpenTarget.open(full, toolchain), "Q4_0").save(tmp_path / "plan.json")
    assert samq("quantize", "--gguf", full, "--plan", plan, "--out", quantized).returncode == 0
    command = ("compensate", quantized, "--gguf", full, "--samples", 4, "--sequence-tokens", 64, "--out", out)

    assert refused(samq(*command), "from a GGUF of the architecture gemma; give the model's Hugging Face folder")
    assert not out.exists()

    done = samq(*command, "--model", folder)
    assert done.returncode == 0, done.stderr
    assert re.search(r"compensated \d+ tensors; their layers keep \d+ % of the output error", done.stderr)
    assert read_tensors(out) == read_tensors(quantized) and file_sha256(out) != file_sha256(quantized)


def test_values_that_compensate_cannot_use_are_refused(samq, tmp_path, gguf):
    command = ("compensate", gguf, "--gguf", gguf, "--out", tmp_path / "out")
    seeded = samq(*command, "--seed", "-1")
    assert seeded.returncode == 2 and "'--seed'" in seeded.stderr
    assert refused(samq(*command, "--dataset", ""), "at least 1 character")


@pytest.fixture
def vocabulary_gguf(tmp_path):
    writer = gguf_package.GGUFWriter(tmp_path / "vocab.gguf", "llama")
    writer.add_vocab_size(64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "vocab.gguf"


def test_a_gguf_of_a_vocabulary_alone_is_inspected(samq, vocabulary_gguf):
    inspected = samq("inspect", vocabulary_gguf)
    assert inspected.returncode == 0, inspected.stderr
    assert re.search(r"all +│ 0 +│ 0 +│ 0.00 +│ +│", inspected.stderr)


def test_a_truncated_or_missing_gguf_is_not_inspected(samq, tmp_path, cut_gguf):
    assert refused(samq("inspect", cut_gguf), "cut.gguf is not a whole GGUF file")
    assert refused(samq("inspect", tmp_path / "nothing.gguf"), "there is no GGUF file at")


def test_reading_a_large_file_shows_progress(shown, tmp_path, gguf, plan):
    inspected = shown("inspect", gguf)
    assert "open tiny.gguf" in inspected and "read tiny.gguf" in inspected
    assert "read tiny.gguf" in shown("quantize", "--gguf", gguf, "--plan", plan, "--out", tmp_path / "out.gguf")


def test_paths_are_shown_with_their_brackets(samq, tmp_path, gguf, plan):
    path = gguf.rename(tmp_path / "model[final].gguf")
    assert "model[final].gguf" in samq("inspect", path).stderr
    out = tmp_path / "out[q4].gguf"
    done = samq("quantize", "--gguf", path, "--plan", plan, "--out", out)
    assert done.returncode == 0 and f"{out}: " in done.stderr


def split(gguf, stem, tensors):
    """The parts of a GGUF that hold at most so many tensors each."""
    program = Path(sysconfig.get_path("platlib")) / "bin" / "llama-gguf-split"
    command = [program, "--split", "--split-max-tensors", str(tensors), gguf, stem]
    subprocess.run(command, check=True, capture_output=True)
    return sorted(stem.parent.glob(f"{stem.name}-*.gguf"))


def test_all_parts_of_a_split_gguf_are_inspected(samq, tmp_path, gguf):
    first, second, third = split(gguf, tmp_path / "split", 10)
    whole, parts = samq("inspect", gguf), samq("inspect", first)
    assert parts.returncode == 0
    rows = [[line for line in done.stderr.splitlines() if line.startswith("│ all")] for done in (whole, parts)]
    assert rows[0] == rows[1] and len(rows[0]) == 1
    assert all(f"sha256 = {file_sha256(part)}  {part}" in parts.stderr for part in (first, second, third))
    assert refused(samq("inspect", second), f"is part 2 of 3 of a GGUF; give the first, {first}")
    third.unlink()
    assert refused(samq("inspect", first), f"{third} is missing")


def test_a_part_of_a_gguf_is_not_quantized(samq, tmp_path, gguf, plan):
    first, *_ = split(gguf, tmp_path / "split", 10)
    done = samq("quantize", "--gguf", first, "--plan", plan, "--out", tmp_path / "out.gguf")
    assert refused(done, "is part 1 of 3 of a GGUF, and not the model; merge the parts with")
    (alone,) = split(gguf, tmp_path / "one", 30)
    assert samq("inspect", alone).returncode == 0
