"""What a run is said to need, against what its stages take."""

import json

import pytest

from flows.parameters import RequantizeParameters
from flows.requirements import estimate
from samq.allocation.target import OpenTarget, stock_plan
from samq.llamacpp.process import run
from samq.llamacpp.toolchain import environment, program
from samq.workspace import Workspace
from tasks.convert import convert
from tasks.evaluate import baseline
from tasks.plan import plan_stock
from tasks.quantize import quantize
from tasks.source import find_model
from tasks.target import Target
from tasks.text import heldout, load_text
from tests.tiny_models import byte_tokenizer, save_folder, tiny_llama, write_llama_gguf

EVALUATION = dict(context_tokens=32, chunks=4, json_prompts=1, speed_requests=1)


@pytest.fixture
def model(tmp_path):
    """A GGUF in full precision."""
    network = tiny_llama(hidden_size=256, intermediate_size=512, vocab_size=300)
    return write_llama_gguf(network, tmp_path / "tiny-f16.gguf", tokenizer=byte_tokenizer(bos="<s>"))


@pytest.fixture
def quantized(model, tmp_path, toolchain):
    """The same in Q8_0, which a run converts first."""
    target = tmp_path / "tiny-q8.gguf"
    command = [program(toolchain, "llama-quantize"), model, target, "Q8_0"]
    run(command, log=tmp_path / "log", timeout_s=60, env=environment(toolchain))
    return target


def parameters(source, tmp_path, **blocks):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"the {number} and then that " * 8}) + "\n" for number in range(24)))
    settings = dict(
        model={"source": str(source), "device": "cpu"},
        calibration={"dataset": {"name": str(text), "samples": 16}, "sequence_tokens": 64, "first_sequences": 4},
        heldout={"name": str(text), "start": 16},
        candidates={"stock": ["Q4_K_M"], "ladder": ["Q4_K", "Q6_K"]},
        evaluation=EVALUATION,
    )
    merged = {name: settings.get(name, {}) | part for name, part in blocks.items()}
    return RequantizeParameters.model_validate(settings | merged)


def by_name(needed):
    return {stage.name: stage for stage in needed.stages}


def test_the_disk_that_a_run_needs_is_what_its_stages_write(quantized, tmp_path, samq_home):
    wanted = parameters(quantized, tmp_path)
    stages, at = by_name(estimate(wanted)), Workspace.here(device="cpu", timeout_s=60.0)
    full = convert(at, find_model(str(quantized)), "F16")
    written = full.files["model.gguf"].bytes
    assert 0.95 * written < stages["convert"].taken.kept <= written  # beside the tensors there is a vocabulary
    target = Target(full, None)
    plan = plan_stock(at, target, "Q4_K_M")
    size = quantize(at, "Q4_K_M", target, plan, {}).files["model.gguf"].bytes
    assert 0.9 * size < stages["quantize"].taken.kept <= size
    tokens = heldout(at, full, load_text(wanted.heldout))
    logits = baseline(at, full, tokens, wanted.evaluation).files["logits.npy"].bytes
    assert stages["baseline"].taken.kept == pytest.approx(logits, abs=1024)
    assert stages["compensate"].taken.kept == stages["quantize"].taken.kept  # the budget is the mixture's size


def test_every_stage_of_the_flow_is_there_in_its_order(model, tmp_path, samq_home):
    needed = estimate(parameters(model, tmp_path, benchmarks={"tasks": ["samq_hellaswag"]}))
    assert " ".join(stage.name.replace(" ", "-") for stage in needed.stages) == (
        "find-model convert agreement layer-inputs baseline calibrate price quantize compensate evaluate benchmark check"
    )
    stages = by_name(needed)
    assert stages["convert"].taken.kept == 0  # a GGUF in full precision is linked
    assert stages["benchmark"].seconds is None
    assert needed.seconds == sum(stage.seconds for stage in needed.stages if stage.name != "benchmark")
    assert stages["calibrate"].what == "gradients of 8 sequences at most, 4 at first"
    assert {resource.name: resource.suffices for resource in needed.resources} == {"RAM": True, "disk": True}


def test_what_a_file_does_not_ask_for_is_not_needed(model, tmp_path, samq_home):
    candidates = {"budgets": [], "thresholds": [0.5, "q0.75"], "proposed_thresholds": 1}
    calibration = {"imatrix": False, "check_sequences": 0}
    few = by_name(estimate(parameters(model, tmp_path, candidates=candidates, calibration=calibration)))
    assert not few.keys() & {"layer inputs", "compensate", "check", "benchmark"}
    assert few["quantize"].what == "4 GGUFs by llama-quantize"
    assert few["calibrate"].what == "gradients of 16 sequences at most"
    nearest = by_name(estimate(parameters(model, tmp_path, candidates={"rounding": "nearest"})))
    assert "compensate" not in nearest
    assert nearest["quantize"].what == "2 GGUFs by llama-quantize"
    compensated = by_name(estimate(parameters(model, tmp_path)))
    assert nearest["layer inputs"].taken.ram < compensated["layer inputs"].taken.ram


def test_a_memory_limit_leaves_blocks_of_a_folder_on_disk(tmp_path, samq_home):
    folder = save_folder(tiny_llama(hidden_size=256, intermediate_size=512), tmp_path / "model")
    whole = by_name(estimate(parameters(folder, tmp_path)))["calibrate"].taken
    limited = by_name(estimate(parameters(folder, tmp_path, model={"memory_limit": "1KB"})))["calibrate"].taken
    assert (whole.scratch, limited.scratch > 0) == (0, True)


@pytest.mark.parametrize("packing, samples, sequences", [(False, None, 24), (False, 20, 20), (True, None, 21)])
def test_sequences_are_counted_by_the_text_if_the_file_does_not_say(
    model, tmp_path, samq_home, packing, samples, sequences
):
    wanted = parameters(model, tmp_path)
    dataset = wanted.calibration.dataset.model_copy(update={"samples": samples})
    changes = {"packing": packing, "check_sequences": 0, "first_sequences": 2, "dataset": dataset}
    wanted = wanted.model_copy(update={"calibration": wanted.calibration.model_copy(update=changes)})
    stage = by_name(estimate(wanted))["calibrate"]
    assert stage.what == f"gradients of {sequences} sequences at most, 2 at first"  # packed: 3,952 bytes, 3 a token


def test_text_of_the_hub_is_not_read(model, tmp_path, samq_home):
    dataset = {"name": "someone/text", "samples": None}
    wanted = parameters(model, tmp_path, calibration={"dataset": dataset, "first_sequences": 6})
    assert by_name(estimate(wanted))["calibrate"].what == "gradients of 6 sequences at most"


def test_the_outlines_mixture_is_llama_quantizes_own(model, tmp_path, samq_home, toolchain):
    stages = by_name(estimate(parameters(model, tmp_path, candidates={"stock": ["Q4_K_M", "Q5_K_M"]})))
    target = OpenTarget.open(model, toolchain)
    sizes = [stock_plan(target, mixture).tensor_bytes for mixture in ("Q4_K_M", "Q5_K_M")]
    assert stages["quantize"].taken.kept == sum(sizes)
