"""`samq plan`, by threshold and by budget."""

import re

import numpy as np

from samq.records import Plan, SensitivityMap
from samq.sensitivity.fisher import Fisher, save_fisher
from tests.command_line import refused
from tests.samq.cli.conftest import save_map


def test_plan_quantize_and_inspect_follow_each_other(samq, tmp_path, gguf, sensitivity):
    files = {path.name for path in tmp_path.iterdir()}
    planned = samq("plan", "--map", sensitivity, "--gguf", gguf, "--threshold", "0.85", "--out", tmp_path / "p.json")
    assert planned.returncode == 0, planned.stderr
    assert "threshold 0.85 keeps 8 of 16 tensors (2 blocks or single tensors) at Q8_0" in planned.stderr
    assert "thresholds change the plan" in planned.stderr
    out = tmp_path / "out.gguf"
    quantized = samq("quantize", "--gguf", gguf, "--plan", tmp_path / "p.json", "--out", out)
    assert quantized.returncode == 0, quantized.stderr
    inspected = samq("inspect", out)
    assert inspected.returncode == 0
    assert f"samq.plan = {Plan.load(tmp_path / 'p.json').digest()}" in inspected.stderr
    assert {path.name for path in tmp_path.iterdir()} == {*files, "p.json", "out.gguf"}


def test_a_threshold_above_nearly_all_scores_keeps_nearly_nothing_and_useful_ones_are_proposed(samq, tmp_path, gguf):
    steep = save_map(tmp_path / "map.json", gguf, lambda number, count: 0.7 ** (count - number))
    planned = samq("plan", "--map", steep, "--gguf", gguf, "--threshold", "0.85")
    assert "threshold 0.85 keeps 1 of 16 tensors (1 blocks or single tensors)" in planned.stderr, planned.stderr
    rows = re.findall(r"│ ([\d.]+) +│ (\d+) +│ ([\d.]+) +│ ([\d.]+) +│", planned.stderr)
    assert len(rows) > 1
    thresholds, kept, sizes, bits = ([float(value) for value in column] for column in zip(*rows, strict=True))
    assert sorted(thresholds, reverse=True) == thresholds and max(thresholds) < 0.85
    assert sorted({*kept}) == kept and sorted({*bits}) == bits and sorted(sizes) == sizes
    for threshold, count in zip(thresholds, kept, strict=True):
        again = samq("plan", "--map", steep, "--gguf", gguf, "--threshold", f"{threshold:g}")
        assert f"threshold {threshold:.4g} keeps {count:.0f} of 16 tensors" in again.stderr


def test_a_budgets_plan_keeps_to_it_and_prints_its_predicted_cost(samq, tmp_path, gguf, sensitivity):
    tensors = SensitivityMap.load(sensitivity).tensors
    random = np.random.default_rng(0)
    fisher = {
        name: Fisher(*(10 * random.random(extent, np.float32) for extent in tensor.shape))
        for name, tensor in tensors.items()
    }
    save_fisher(tmp_path / "map.fisher.safetensors", fisher)
    arguments = ("plan", "--map", sensitivity, "--gguf", gguf, "--type", "Q4_K", "--type", "Q6_K", "--budget")
    assert refused(samq(*arguments, "5bpw"), "make one with `samq imatrix` and pass it as --imatrix")
    arguments = (*arguments[:-1], "--no-imatrix", "--budget")
    planned = samq(*arguments, "5bpw", "--out", tmp_path / "p.json")
    assert planned.returncode == 0, planned.stderr
    plan = Plan.load(tmp_path / "p.json")
    assert plan.bits_per_weight <= 5
    assert set(plan.types.values()) == {"Q4_K", "Q6_K"}
    assert "predicted" in planned.stderr
    assert planned.stderr.count("is over 0.3, where rounding is no small change") == 1, "not by the stage as well"
    assert refused(samq(*arguments, "much"), "'much' is not a budget")
    assert refused(samq(*arguments, "1bpw"), "the smallest possible is 4.")
    assert refused(samq(*arguments, "5bpw", "--threshold", "0.5"), "--budget and --threshold exclude each other")
    (tmp_path / "map.fisher.safetensors").unlink()
    assert refused(samq(*arguments, "5bpw"), "map.fisher.safetensors does not exist")


def test_values_that_plan_cannot_use_are_refused(samq, gguf, sensitivity):
    plan = ("plan", "--map", sensitivity, "--gguf", gguf)
    assert refused(samq(*plan, "--threshold", "1.5"), "threshold 1.5 is not in 0..1")
    assert refused(samq(*plan, "--keep", "Q9_9"), "unknown ggml type 'Q9_9'")
    done = samq(*plan, "--grouping", "layer")
    assert done.returncode == 2 and "'block', 'tensor'" in done.stderr
    assert refused(samq(*plan, "--imatrix", gguf, "--no-imatrix"), "--imatrix and --no-imatrix exclude each other")


def test_a_truncated_or_missing_gguf_is_not_planned(samq, tmp_path, cut_gguf, sensitivity):
    plan = ("plan", "--map", sensitivity, "--gguf")
    assert refused(samq(*plan, cut_gguf), "cut.gguf is not a whole GGUF file")
    assert refused(samq(*plan, tmp_path / "nothing.gguf"), "there is no GGUF file at")


def test_a_missing_llama_quantize_is_named(samq, tmp_path, gguf, sensitivity):
    done = samq("plan", "--map", sensitivity, "--gguf", gguf, SAMQ_LLAMA_CPP=str(tmp_path))
    assert refused(done, "llama-quantize is not in")


def test_a_full_disk_gets_no_half_plan(samq, gguf, sensitivity, disk):
    disk.fill()
    done = samq("plan", "--map", sensitivity, "--gguf", gguf, "--out", disk.folder / "p.json")
    assert refused(done, "p.json: No space left on device")
    assert [path.name for path in disk.folder.iterdir()] == ["filling"]


def test_planning_shows_progress(shown, gguf, sensitivity):
    assert "plan tiny.gguf" in shown("plan", "--map", sensitivity, "--gguf", gguf)
