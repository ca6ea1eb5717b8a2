"""From weights to a compensated GGUF by the real stages, on a tiny model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from samq.allocation.budget import BudgetPolicy
from samq.allocation.prices import plan_cost
from samq.files import CALIBRATION_SET_NAME, COMPENSATED_NAME, COMPENSATION_NAME, QUANTIZED_NAME, TOKENS_NAME
from samq.gguf.audit import audit
from samq.gguf.file import file_sha256, read_metadata, read_tensors
from samq.quantization.recipes import recipes, tensors_to_compensate
from samq.records import CalibrationSet, Compensation, QuantizedModel
from samq.sensitivity.checkpoint import describe_source
from samq.store import Store
from samq.workspace import Workspace
from tasks.calibrate import Passes, calibrate
from tasks.compensate import compensate, compensate_rung, gram
from tasks.ladder import rung
from tasks.model import TorchModel
from tasks.plan import load_plan, plan_budget
from tasks.price import load_prices, price, price_compensated
from tasks.quantize import assemble
from tasks.target import Target
from tasks.text import FirstSequences
from tests.tiny_models import random_tokens, save_folder, tiny_llama, write_llama_gguf

TOKENS = random_tokens(lengths=(60,) * 24)
BUDGET = "5bpw"


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
    torch_model, target = TorchModel(source, full), Target(full, imatrix=None)
    sequences = FirstSequences(publish("tokenize", save_text), 16)
    rungs = {name: rung(at, name, target) for name in ("Q3_K", "Q4_K", "Q6_K")}
    sensitivities = calibrate(at, torch_model, sequences, None, Passes(batch_size=4))
    grams = gram(at, torch_model, sequences, 10_000, 4)
    nearest_prices = price(at, target, rungs, sensitivities, "Q8_0")
    prices = price_compensated(at, nearest_prices, grams)
    plan = plan_budget(at, target, prices, BUDGET, BudgetPolicy())
    tensors_of = tensors_to_compensate(
        recipes({"it": load_plan(plan)}, read_tensors(full.path("model.gguf")), rungs).values()
    )
    compensated = {
        name: compensate_rung(at, name, full, rungs[name], tensors, grams) for name, tensors in tensors_of.items()
    }
    provenance = {"version": "1"}
    nearest = assemble(at, "it", full, plan, rungs, {}, provenance)
    return dict(
        full=full,
        nearest_prices=nearest_prices,
        prices=prices,
        plan=plan,
        nearest=nearest,
        compensated=assemble(at, "it", full, plan, rungs, compensated, provenance),
        whole=compensate(at, "it", full, plan, nearest, grams),
        **{f"compensated {name}": artifact for name, artifact in compensated.items()},
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
    errors = Compensation.load(artifacts["whole"].path(COMPENSATION_NAME)).tensors
    assert {"output.weight", "blk.1.ffn_down.weight"} <= errors.keys()


def test_a_copy_of_compensated_tensors_is_what_compensating_the_whole_file_gives(artifacts):
    """So a plan costs a copy, whatever tensors were compensated for other plans before."""
    assert artifacts["compensated"].files["model.gguf"].sha256 == artifacts["whole"].files["model.gguf"].sha256
    plan, wholes = load_plan(artifacts["plan"]), Compensation.load(artifacts["whole"].path(COMPENSATION_NAME)).tensors
    parts = {name.split()[1]: part for name, part in artifacts.items() if name.startswith("compensated ")}
    assert len(parts) > 1
    for name, part in parts.items():
        held = read_tensors(part.path(COMPENSATED_NAME))
        assert held and {tensor.type for tensor in held.values()} == {name}
        assert all(plan.types[tensor] == name for tensor in held)
        errors = Compensation.load(part.path(COMPENSATION_NAME)).tensors
        assert errors == {tensor: wholes[tensor] for tensor in held}


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
