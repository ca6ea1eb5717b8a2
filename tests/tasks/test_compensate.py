"""From weights to a compensated GGUF by the real stages, on a tiny model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from samq.allocation.budget import BudgetPolicy
from samq.allocation.prices import plan_cost
from samq.files import CALIBRATION_SET_NAME, COMPENSATION_NAME, IMATRIX_NAME, QUANTIZED_NAME, TOKENS_NAME
from samq.gguf.audit import audit
from samq.gguf.file import file_sha256, read_metadata, read_tensors
from samq.gguf.imatrix import usable_entries
from samq.records import CalibrationSet, Compensation, QuantizedModel
from samq.sensitivity.checkpoint import describe_source
from samq.store import Store
from samq.workspace import Workspace
from tasks.calibrate import Passes, calibrate
from tasks.compensate import candidate, compensate, compensate_file
from tasks.layer_inputs import InputText, layer_inputs
from tasks.model import TorchModel
from tasks.plan import load_plan, plan_budget
from tasks.price import choose_types, load_prices, price, price_compensated
from tasks.quantize import quantize
from tasks.target import Target
from tasks.text import FirstSequences
from tests.tiny_models import random_tokens, save_folder, tiny_llama, write_llama_gguf

TOKENS = random_tokens(lengths=(60,) * 24)
BUDGETS = {"it": "5bpw", "smaller": "4.6bpw"}


@pytest.fixture(scope="module")
def artifacts(toolchain, tmp_path_factory):
    """Stage -> artifact, of a budget's plan from its prices to the GGUF without and with compensation."""
    folder = tmp_path_factory.mktemp("compensate")
    model, store = tiny_llama(hidden_size=256, intermediate_size=256, initializer_range=0.06), Store(folder / "store")
    source = describe_source(save_folder(model, folder / "model"))

    def publish(stage, write):
        with store.publish(stage, "k") as place:
            write(place)
        return store.find(stage, "k")

    def save_text(place):
        TOKENS.save(place / TOKENS_NAME)
        CalibrationSet(
            dataset="random", samples=len(TOKENS), sequence_tokens=60, tokens=int(TOKENS.lengths.sum()), seed=0,
            tokens_digest=TOKENS.digest(),
        ).save(place / CALIBRATION_SET_NAME)  # fmt: skip

    at = Workspace(store.root, toolchain, device="cpu", timeout_s=60.0)
    full = publish("convert", lambda place: write_llama_gguf(model, place / "model.gguf"))
    torch_model = TorchModel(source, full)
    sequences = FirstSequences(publish("tokenize", save_text), 16)
    text = InputText(sequences.tokens, 16, 10_000, 4)
    inputs = layer_inputs(at, torch_model, text, True)
    target = Target(full, inputs)
    sensitivities = calibrate(at, torch_model, sequences, None, Passes(batch_size=4))
    nearest_prices = price(at, target, choose_types(at, target, ("Q3_K", "Q4_K", "Q6_K")), sensitivities, "Q8_0")
    prices = price_compensated(at, nearest_prices, inputs)
    plans = {name: plan_budget(at, target, prices, BUDGETS[name], BudgetPolicy()) for name in BUDGETS}
    provenance = {"version": "1"}
    built = compensate(at, torch_model, text, inputs, plans, provenance)
    nearest = quantize(at, "it", target, plans["it"], provenance)
    return dict(
        full=full,
        nearest_prices=nearest_prices,
        prices=prices,
        plans=plans,
        plan=plans["it"],
        nearest=nearest,
        built=built,
        compensated=candidate(at, "it", full, plans["it"], built, provenance),
        file=compensate_file(at, torch_model, text, nearest),
        inputs=inputs,
        model=torch_model,
        tokens=sequences.tokens,
    )


def test_the_plan_says_how_it_is_rounded_and_costs_less(artifacts):
    plan = load_plan(artifacts["plan"])
    assert plan.rounding == "compensated"
    cost, before = (plan_cost(load_prices(artifacts[name]), plan.types) for name in ("prices", "nearest_prices"))
    assert plan.predicted_kl_nats == cost.value < 0.9 * before.value


def test_the_gguf_is_the_plans_and_described(artifacts):
    plan, gguf = load_plan(artifacts["plan"]), artifacts["compensated"].path("model.gguf")
    audit(gguf, plan)
    model = QuantizedModel.load(artifacts["compensated"].path(QUANTIZED_NAME))
    assert model.sha256 == file_sha256(gguf) != file_sha256(artifacts["nearest"].path("model.gguf"))
    assert model.metadata == {key: v for key, v in read_metadata(gguf).items() if key.startswith("samq.")}
    assert model.metadata["samq.plan"] == plan.digest() and model.metadata["samq.version"] == "1"
    errors = Compensation.load(artifacts["compensated"].path(COMPENSATION_NAME)).tensors
    assert {"output.weight", "blk.1.ffn_down.weight"} <= errors.keys()


def test_plans_that_are_built_together_take_the_disk_once(artifacts):
    built, gguf = artifacts["built"], artifacts["compensated"].path("model.gguf")
    assert built.files.keys() == {"it.gguf", "it.json", "smaller.gguf", "smaller.json"}
    assert built.path("it.gguf").samefile(gguf), "one file of two names"
    assert built.path("smaller.gguf").stat().st_size < gguf.stat().st_size


def test_a_file_of_llama_quantize_becomes_the_same(artifacts):
    assert artifacts["file"].files["model.gguf"].sha256 == artifacts["compensated"].files["model.gguf"].sha256
    errors = [Compensation.load(artifacts[name].path(COMPENSATION_NAME)) for name in ("file", "compensated")]
    assert errors[0] == errors[1]


def test_the_importance_matrix_is_of_all_that_has_an_input(artifacts):
    path, tensors = artifacts["inputs"].path(IMATRIX_NAME), read_tensors(artifacts["full"].path("model.gguf"))
    assert usable_entries(path, tensors) == {
        name for name, tensor in tensors.items() if len(tensor.shape) > 1 and name != "token_embd.weight"
    }


def test_a_model_that_stays_on_disk_gives_the_same_file(artifacts, toolchain, tmp_path):
    """Limited to a byte, its blocks are read from disk; the store is another, so that everything is made again."""
    at = Workspace(tmp_path / "store", toolchain, device="cpu", timeout_s=60.0, memory_limit=1)
    text = InputText(artifacts["tokens"], 16, 10_000, 4)
    provenance, plans = {"version": "1"}, {"it": artifacts["plan"]}
    on_disk = compensate(at, artifacts["model"], text, artifacts["inputs"], plans, provenance)
    assert on_disk.files["it.gguf"].sha256 == artifacts["compensated"].files["model.gguf"].sha256
    assert not list(at.store.glob(".tmp/going-on-*"))


def test_what_is_killed_before_its_files_are_in_the_store_gives_the_same_files(
    artifacts, toolchain, tmp_path, monkeypatch
):
    at = Workspace(tmp_path / "store", toolchain, device="cpu", timeout_s=60.0, memory_limit=1)
    text = InputText(artifacts["tokens"], 16, 10_000, 4)
    inputs, plans = artifacts["inputs"], artifacts["plans"]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_move_into_place", killed)
        with pytest.raises(KeyboardInterrupt):
            compensate(at, artifacts["model"], text, inputs, plans, {"version": "1"})
    again = compensate(at, artifacts["model"], text, inputs, plans, {"version": "1"})
    assert {name: file.sha256 for name, file in again.files.items()} == {
        name: file.sha256 for name, file in artifacts["built"].files.items()
    }


@torch.no_grad()
def logits_of(gguf):
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    return model(torch.from_numpy(TOKENS.ids[16:]).long()).logits.log_softmax(-1)


def test_it_is_nearer_to_full_precision_on_other_text(artifacts):
    exact = logits_of(artifacts["full"].path("model.gguf"))
    nearest, compensated = (
        (exact.exp() * (exact - logits_of(artifacts[name].path("model.gguf")))).sum(-1).mean().item()
        for name in ("nearest", "compensated")
    )
    assert 0 < compensated < 0.95 * nearest
