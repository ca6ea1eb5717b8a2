"""The command line as a person meets it: exit code 2 and one sentence for every kind of bad input."""

import json
import os
import re
import resource
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import gguf as gguf_package
import numpy as np
import psutil
import pytest

from samq.allocation.threshold import Target, stock_plan
from samq.cli import app as cli
from samq.gguf.file import file_sha256, read_metadata
from samq.records import Plan, SensitivityMap, TensorSensitivity
from samq.sensitivity.fisher import Fisher, save_fisher
from tests.command_line import refused, samq
from tests.conftest import write_tiny_gguf
from tests.tiny_models import byte_tokenizer, save_folder, tiny_llama, write_llama_gguf

DEMO = Path(__file__).parents[3] / "deployments" / "parameters" / "demo.yaml"


@pytest.fixture
def gguf(tmp_path):
    return write_tiny_gguf(tmp_path / "tiny.gguf")


def save_map(path, gguf, score):
    """A sensitivity map of the file's matrices, with a score for each (number, how many)."""
    from samq.gguf.file import read_tensors

    matrices = [tensor for tensor in read_tensors(gguf).values() if len(tensor.shape) == 2]
    tensors = {
        tensor.name: TensorSensitivity(
            shape=tensor.shape,
            gradient_norm=1,
            gradient_norm_stderr=0,
            score=score(index + 1, len(matrices)),
            sequence_squares=(1.0, 1.0),
        )
        for index, tensor in enumerate(matrices)
    }
    made = SensitivityMap(
        model_digest="m",
        calibration_digest="c",
        labels="text",
        seed=0,
        sequence_tokens=(1, 1),
        loss_nats=1,
        tied_embeddings=False,
        tensors=tensors,
    )
    return made.save(path)


@pytest.fixture
def sensitivity(tmp_path, gguf):
    return save_map(tmp_path / "map.json", gguf, lambda number, count: number / count)


def test_plan_quantize_and_inspect_follow_each_other(tmp_path, gguf, sensitivity):
    planned = samq(
        "plan", "--map", sensitivity, "--gguf", gguf, "--threshold", "0.85", "--out", tmp_path / "p.json", home=tmp_path
    )
    assert planned.returncode == 0, planned.stderr
    assert "threshold 0.85 keeps 8 of 16 tensors (2 blocks or single tensors) at Q8_0" in planned.stderr
    assert "thresholds change the plan" in planned.stderr
    out = tmp_path / "out.gguf"
    built = samq("quantize", "--gguf", gguf, "--plan", tmp_path / "p.json", "--out", out, home=tmp_path)
    assert built.returncode == 0, built.stderr
    shown = samq("inspect", out, home=tmp_path)
    assert shown.returncode == 0
    assert f"samq.plan = {Plan.load(tmp_path / 'p.json').digest()}" in shown.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "map.json", "p.json", "out.gguf"}


def test_a_threshold_above_nearly_all_scores_keeps_nearly_nothing_and_useful_ones_are_proposed(tmp_path, gguf):
    steep = save_map(tmp_path / "map.json", gguf, lambda number, count: 0.7 ** (count - number))
    planned = samq("plan", "--map", steep, "--gguf", gguf, "--threshold", "0.85", home=tmp_path)
    assert "threshold 0.85 keeps 1 of 16 tensors (1 blocks or single tensors)" in planned.stderr, planned.stderr
    rows = re.findall(r"│ ([\d.]+) +│ (\d+) +│ ([\d.]+) +│ ([\d.]+) +│", planned.stderr)
    assert len(rows) > 1
    cuts, kept, sizes, bits = ([float(value) for value in column] for column in zip(*rows, strict=True))
    assert sorted(cuts, reverse=True) == cuts and max(cuts) < 0.85
    assert sorted({*kept}) == kept and sorted({*bits}) == bits and sorted(sizes) == sizes
    for cut, count in zip(cuts, kept, strict=True):
        again = samq("plan", "--map", steep, "--gguf", gguf, "--threshold", f"{cut:g}", home=tmp_path)
        assert f"threshold {cut:.4g} keeps {count:.0f} of 16 tensors" in again.stderr


def test_a_budgets_plan_keeps_to_it_and_says_what_it_is_predicted_to_cost(tmp_path, gguf, sensitivity):
    known = SensitivityMap.load(sensitivity)
    random = np.random.default_rng(0)
    fisher = {
        name: Fisher(*(10 * random.random(extent, np.float32) for extent in tensor.shape))
        for name, tensor in known.tensors.items()
    }
    save_fisher(tmp_path / "map.fisher.safetensors", fisher)
    arguments = ("plan", "--map", sensitivity, "--gguf", gguf, "--type", "Q4_K", "--type", "Q6_K", "--budget")
    assert refused(
        samq(*arguments, "5bpw", home=tmp_path / "home"), "make one by `samq imatrix` and give it as --imatrix"
    )
    arguments = (*arguments[:-1], "--no-imatrix", "--budget")
    made = samq(*arguments, "5bpw", "--out", tmp_path / "p.json", home=tmp_path / "home")
    assert made.returncode == 0, made.stderr
    plan = Plan.load(tmp_path / "p.json")
    assert plan.bits_per_weight <= 5
    assert set(plan.types.values()) == {"Q4_K", "Q6_K"}
    assert "predicted" in made.stderr
    assert made.stderr.count("is over 0.3, where rounding is no small change") == 1, "not by the stage as well"
    assert refused(samq(*arguments, "much", home=tmp_path / "home"), "'much' is not a budget")
    assert refused(samq(*arguments, "1bpw", home=tmp_path / "home"), "the smallest possible is 4.")
    assert refused(
        samq(*arguments, "5bpw", "--threshold", "0.5", home=tmp_path), "give one of --budget and --threshold"
    )
    (tmp_path / "map.fisher.safetensors").unlink()
    assert refused(samq(*arguments, "5bpw", home=tmp_path / "home"), "there is no file")


def test_a_threshold_outside_its_range_and_an_unknown_type_are_refused(tmp_path, gguf, sensitivity):
    plan = ("plan", "--map", sensitivity, "--gguf", gguf)
    assert refused(samq(*plan, "--threshold", "1.5", home=tmp_path), "threshold 1.5 is not in 0..1")
    assert refused(samq(*plan, "--keep", "Q9_9", home=tmp_path), "unknown ggml type 'Q9_9'")
    assert refused(samq(*plan, "--grouping", "layer", home=tmp_path), "neither block nor tensor")


def test_a_truncated_or_missing_gguf_is_refused(tmp_path, gguf, sensitivity):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[:20000])
    assert refused(samq("inspect", cut, home=tmp_path), "cut.gguf is not a whole GGUF file")
    assert refused(samq("inspect", tmp_path / "nothing.gguf", home=tmp_path), "there is no GGUF file at")
    planned = ("plan", "--map", sensitivity, "--gguf")
    assert refused(samq(*planned, cut, home=tmp_path), "cut.gguf is not a whole GGUF file")
    assert refused(samq(*planned, tmp_path / "nothing.gguf", home=tmp_path), "nothing.gguf: No such file")


@pytest.fixture
def plan(tmp_path, gguf, toolchain):
    return stock_plan(Target.open(gguf, toolchain), "Q4_K_M").save(tmp_path / "plan.json")


def test_a_missing_input_of_quantize_is_refused(tmp_path, gguf, plan):
    arguments = ("quantize", "--plan", plan, "--out", tmp_path / "out.gguf", "--gguf")
    assert refused(samq(*arguments, tmp_path / "nothing.gguf", home=tmp_path), "nothing.gguf: No such file")
    done = samq(*arguments, gguf, "--imatrix", tmp_path / "nothing.imatrix", home=tmp_path)
    assert refused(done, "there is no importance matrix at")


def test_a_plan_is_quantized_with_its_own_importance_matrix_or_none(tmp_path, gguf, plan):
    own, other = tmp_path / "own.imatrix", tmp_path / "other.imatrix"
    own.write_text("own")
    other.write_text("other")
    weighted = Plan.load(plan).model_copy(update={"imatrix_sha256": file_sha256(own)}).save(tmp_path / "weighted.json")

    def quantize(plan, *arguments):
        out = tmp_path / "out.gguf"
        return samq("quantize", "--gguf", gguf, "--plan", plan, "--out", out, *arguments, home=tmp_path)

    made = f"plan Q4_K_M was made with importance matrix {file_sha256(own)[:12]} and"
    assert refused(quantize(weighted), f"{made} none is given; give that one, or plan again")
    assert refused(quantize(weighted, "--imatrix", other), f"{made} {file_sha256(other)[:12]} is given")
    without = "was made without importance matrix and"
    assert refused(quantize(plan, "--imatrix", own), f"{without} {file_sha256(own)[:12]} is given; leave it out")
    assert not (tmp_path / "out.gguf").exists()


def test_a_plan_of_compensated_rounding_is_no_plan_for_llama_quantize(tmp_path, gguf, plan):
    wanted = Plan.load(plan).model_copy(update={"rounding": "compensated"}).save(tmp_path / "compensated.json")
    done = samq("quantize", "--gguf", gguf, "--plan", wanted, "--out", tmp_path / "out.gguf", home=tmp_path)
    assert refused(done, "compensated.json is a plan of compensated rounding")
    assert "`samq compensate`" in done.stderr
    assert not (tmp_path / "out.gguf").exists()


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, gguf, plan):
    arguments = ("quantize", "--gguf", gguf, "--plan", plan, "--out")
    assert refused(samq(*arguments, tmp_path / "no" / "out.gguf", home=tmp_path), "the folder of")
    assert refused(samq(*arguments, "/proc/out.gguf", home=tmp_path), "/proc cannot be written to")
    assert refused(samq(*arguments, tmp_path, home=tmp_path), "is a folder; name a file in it")


def test_a_read_only_output_folder_is_refused_before_the_work(tmp_path, gguf, plan, disk):
    disk.make_read_only()
    arguments = ("quantize", "--gguf", gguf, "--plan", plan, "--out", disk.folder / "out.gguf")
    assert refused(samq(*arguments, home=tmp_path), "disk cannot be written to (Read-only file system)")
    done = samq("evaluate", gguf, "--baseline", gguf, "--out", disk.folder / "out", home=tmp_path)
    assert refused(done, "out cannot be written to (Read-only file system)")
    config = tmp_path / "c.yaml"
    done = samq("requantize", "--config", config, home=disk.folder / "samq")
    assert refused(done, "samq cannot be written to (Read-only file system); set SAMQ_HOME")


def test_a_full_output_folder_is_refused_and_gets_no_half_file(tmp_path, gguf, plan, sensitivity, disk):
    disk.fill()
    done = samq("quantize", "--gguf", gguf, "--plan", plan, "--out", disk.folder / "out.gguf", home=tmp_path)
    assert refused(done, "has 0 bytes free and Q4_K_M needs")
    done = samq("plan", "--map", sensitivity, "--gguf", gguf, "--out", disk.folder / "p.json", home=tmp_path)
    assert refused(done, "p.json: No space left on device")
    assert [path.name for path in disk.folder.iterdir()] == ["filling"]


def test_an_output_that_cannot_grow_gets_no_half_file(tmp_path, gguf, plan):
    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    arguments = ("quantize", "--gguf", gguf, "--plan", plan, "--out", tmp_path / "out" / "out.gguf")
    (tmp_path / "out").mkdir()
    done = samq(*arguments, home=tmp_path, preexec_fn=limit_file_size)
    assert refused(done, "llama-quantize was killed by signal 25 (File size limit exceeded)")
    (log,) = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert f"(log: {log})" in done.stderr


def test_a_missing_llama_quantize_is_named(tmp_path, gguf, sensitivity):
    done = samq("plan", "--map", sensitivity, "--gguf", gguf, home=tmp_path, SAMQ_LLAMA_CPP=str(tmp_path))
    assert refused(done, "llama-quantize is not in")


def test_a_plan_for_another_file_is_refused(tmp_path, gguf, sensitivity):
    plan = tmp_path / "p.json"
    assert samq("plan", "--map", sensitivity, "--gguf", gguf, "--out", plan, home=tmp_path).returncode == 0
    other = write_tiny_gguf(tmp_path / "other.gguf", seed=1)
    done = samq("quantize", "--gguf", other, "--plan", plan, "--out", tmp_path / "o.gguf", home=tmp_path)
    assert refused(done, "is a plan for another file")


@pytest.fixture
def model(tmp_path):
    return save_folder(tiny_llama(), tmp_path / "model")


def edit_config(model, **fields):
    config = model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))


def give_unknown_tokenizer(model):
    byte_tokenizer().save_pretrained(model)
    edit_config(model, vocab_size=512)


def cut_short(model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: (model / "config.json").unlink(), "model is not a model folder: it has no config.json"),
        (
            lambda model: edit_config(model, architectures=["BertForMaskedLM"]),
            "model is a BertForMaskedLM, not a causal",
        ),
        (
            lambda model: edit_config(model, architectures=["CTRLLMHeadModel"], model_type="ctrl"),
            "llama.cpp's converter does not support CTRLLMHeadModel (model)",
        ),
        (
            give_unknown_tokenizer,
            "llama.cpp's converter does not know the tokenizer of model; convert the model with a llama.cpp",
        ),
        (cut_short, "model.safetensors has 74316 bytes where its header promises 74416"),
        (lambda model: None, "has no field 'text'; name some of its fields: body"),
    ],
    ids=[
        "no config",
        "unknown to transformers",
        "unknown to llama.cpp",
        "unknown tokenizer",
        "truncated safetensors",
        "no such field",
    ],
)
def test_what_cannot_be_calibrated_is_refused(tmp_path, model, spoil, message):
    spoil(model)
    field = "text" if "field" in message else "body"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": f"w1 w2 w{number}"}) + "\n" for number in range(4)))
    arguments = ("calibrate", model, "--dataset", rows, "--field", field, "--samples", 4, "--out", tmp_path / "m.json")
    assert refused(samq(*arguments, home=tmp_path / "h"), message)
    assert not (tmp_path / "m.json").exists()


def test_a_truncated_gguf_is_not_calibrated(tmp_path, gguf):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[:20000])
    done = samq("calibrate", cut, "--out", tmp_path / "m.json", home=tmp_path / "h")
    assert refused(done, "cut.gguf is not a whole GGUF file")


def test_an_importance_matrix_is_made_and_used(tmp_path):
    shape = dict(vocab_size=264, max_position_embeddings=128)
    full = write_llama_gguf(tiny_llama(**shape), tmp_path / "full.gguf", tokenizer=byte_tokenizer(bos="<s>"))
    text, matrix = tmp_path / "text.txt", tmp_path / "matrix.gguf"
    text.write_text("the man ran and ran\n" * 40)
    arguments = ("imatrix", "--gguf", full, "--dataset", text, "--sequence-tokens", 64, "--out", matrix)
    done = samq(*arguments, home=tmp_path / "h", FORCE_COLOR="1")
    assert done.returncode == 0, done.stderr
    for what in ("load Python packages", f"read {text}", "open full.gguf"):
        assert what in done.stderr
    assert read_metadata(matrix)["general.type"] == "imatrix"
    sensitivity = save_map(tmp_path / "map.json", full, lambda number, count: number / count)
    plan = ("plan", "--map", sensitivity, "--gguf", full, "--imatrix", matrix, "--out", tmp_path / "p.json")
    assert samq(*plan, home=tmp_path / "h").returncode == 0
    assert Plan.load(tmp_path / "p.json").imatrix_sha256 == file_sha256(matrix)
    assert refused(samq(*plan, "--no-imatrix", home=tmp_path / "h"), "--no-imatrix contradicts --imatrix")
    text.write_text("the man")
    assert refused(samq(*arguments, home=tmp_path / "h"), "tokenizes to only 5 tokens")


def test_plain_text_files_are_calibrated_and_evaluated_on(tmp_path):
    shape = dict(vocab_size=264, max_position_embeddings=128)
    full = write_llama_gguf(tiny_llama(**shape), tmp_path / "full.gguf", tokenizer=byte_tokenizer(bos="<s>"))
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text("".join(f"line {number} of one document\n\n" for number in range(150)))
    other.write_text("the other text\n" * 40)
    calibrate = ("calibrate", full, "--dataset", text, "--sequence-tokens", 64, "--out", tmp_path / "map.json")
    done = samq(*calibrate, home=tmp_path / "home", FORCE_COLOR="1")
    assert done.returncode == 0, done.stderr
    for what in ("load Python packages", f"read {text}", f"tokenize {text}", "load full", "compare full with its GGUF"):
        assert what in done.stderr, "long work is seen on a terminal"
    assert SensitivityMap.load(tmp_path / "map.json").sequence_tokens == (63,) * cli.CALIBRATION_SAMPLES
    done = samq(*calibrate, "--samples", 1000, home=tmp_path / "home")
    assert refused(done, "sequences of 64 tokens, too few for 1000; ask for fewer or shorter ones")
    done = samq(
        "evaluate", full, "--baseline", full, "--dataset", other, "--context-tokens", 64, "--chunks", 2,
        home=tmp_path / "home", FORCE_COLOR="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for what in ("load Python packages", f"read {other}", f"tokenize {other}"):
        assert what in done.stderr
    assert "fidelity/mean_kld_nats" in done.stderr
    assert "from sample 0 on" in done.stderr


def test_values_that_options_cannot_have_are_refused(tmp_path, gguf):
    for command in (("calibrate", gguf), ("compensate", gguf, "--gguf", gguf)):
        seeded = samq(*command, "--out", tmp_path / "out", "--seed", "-1", home=tmp_path)
        assert seeded.returncode == 2 and "'--seed'" in seeded.stderr and "Traceback" not in seeded.stderr
        assert refused(
            samq(*command, "--out", tmp_path / "out", "--dataset", "", home=tmp_path), "at least 1 character"
        )


def test_a_gguf_of_a_vocabulary_alone_is_inspected(tmp_path):
    writer = gguf_package.GGUFWriter(tmp_path / "vocab.gguf", "llama")
    writer.add_vocab_size(64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shown = samq("inspect", tmp_path / "vocab.gguf", home=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"all +│ 0 +│ 0 +│ 0.00 +│ +│", shown.stderr)


@pytest.fixture
def seen(terminal):
    """Run a command here, and tell what was on the terminal while it worked."""

    def run(*arguments):
        start = terminal.tell()
        with suppress(SystemExit):
            cli.main([*map(str, arguments)])
        return terminal.getvalue()[start:]

    return run


def test_reading_a_large_file_is_seen_on_the_terminal(tmp_path, gguf, plan, sensitivity, samq_home, seen, terminal):
    inspected = seen("inspect", gguf)
    assert "open tiny.gguf" in inspected and "read tiny.gguf" in inspected
    assert "plan tiny.gguf" in seen("plan", "--map", sensitivity, "--gguf", gguf)
    assert "read tiny.gguf" in seen("quantize", "--gguf", gguf, "--plan", plan, "--out", tmp_path / "out.gguf")
    start = terminal.tell()
    cli._adopt({"model.gguf": gguf})
    adopted = terminal.getvalue()[start:]
    assert "open tiny.gguf" in adopted and "read tiny.gguf" in adopted


def test_asking_mlflow_and_looking_around_are_seen_on_the_terminal(samq_home, seen, mlflow_uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    for command, what in {
        ("status",): "ask MLflow",
        ("rollback", "nothing", "--reason", "x"): "roll nothing back",
        ("prune", "--older-than-days", 1): "free disk",
    }.items():
        said = seen(*command)
        assert "load Python packages" in said and what in said
    assert "look at this machine" in seen("doctor")


@pytest.mark.e2e
def test_services_end_with_one_that_ends_by_itself(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {"SAMQ_HOME": str(tmp_path / "home"), "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    command = [sys.executable, "-m", "samq.cli.app", "ui", "--mlflow-port", port]
    with subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True) as ui:
        said = ""
        while "Ctrl-C ends both" not in said:
            line = ui.stderr.readline()
            assert line, said
            said += line
        (mlflow,) = psutil.Process(ui.pid).children()
        mlflow.kill()
        assert ui.wait(60) == 1
        assert f"samq: MLflow was killed by signal 9; see {tmp_path / 'home' / 'mlflow.log'}" in ui.stderr.read()
    while in_use(int(port)):  # the killed need a moment to go
        time.sleep(0.1)


def in_use(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_wrong_parameter_file_is_refused(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("name: x\n")
    assert refused(samq("requantize", "--config", config, home=tmp_path), "model: Field required")
    config.write_text(DEMO.read_text().replace("thresholds: []", "thresholds: [0.5, q1.5]"))
    assert refused(samq("requantize", "--config", config, home=tmp_path), "threshold q1.5 is not in 0..1")
    config.write_text(DEMO.read_text().replace("keep: Q8_0", "keep: Q9_9"))
    assert refused(samq("requantize", "--config", config, home=tmp_path), "unknown ggml type 'Q9_9'")


def test_a_prefect_server_that_does_not_answer_is_one_sentence(tmp_path):
    done = samq("requantize", "--config", DEMO, home=tmp_path / "h", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert refused(done, "Prefect's server does not answer (ConnectError: ")
