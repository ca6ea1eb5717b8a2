"""From weights to a compensated GGUF by the real stages, on a tiny model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from samq.allocation.budget import BudgetPolicy
from samq.allocation.ladder import rungs_of
from samq.allocation.prices import plan_cost
from samq.files import COMPENSATED_NAME, COMPENSATION_NAME, TOKENS_NAME
from samq.gguf.audit import audit
from samq.gguf.file import file_sha256, read_metadata, read_tensors
from samq.records import CalibrationSet, Compensation, QuantizedModel
from samq.sensitivity.hf_model import describe_source
from samq.store import Store
from tasks.calibrate import calibrate
from tasks.compensate import compensate, compensate_rung, gram, price_compensated
from tasks.ladder import rung
from tasks.plan import load_plan, plan_budget
from tasks.price import load_prices, price
from tasks.quantize import MODEL_NAME, assemble
from tasks.text import SET_NAME
from tests.tiny_models import random_tokens, save_folder, tiny_llama, write_llama_gguf

TOKENS = random_tokens(lengths=(60,) * 24)
BUDGET = "5bpw"


@pytest.fixture(scope="module")
def made(toolchain, tmp_path_factory):
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
        ).save(place / SET_NAME)  # fmt: skip

    root = store.root
    full = publish("convert", lambda place: write_llama_gguf(model, place / "model.gguf"))
    tokens = publish("tokenize", save_text)
    rungs = {name: rung.fn(root, name, full, None, toolchain, 60.0) for name in ("Q3_K", "Q4_K", "Q6_K")}
    sensitivities = calibrate.fn(root, source, full, tokens, 16, None, 4, "float32", "cpu", "model", 0)
    grams = gram.fn(root, source, full, tokens, 16, 10_000, 4, "float32", "cpu")
    nearest_prices = price.fn(root, full, rungs, sensitivities, None, toolchain)
    prices = price_compensated.fn(root, nearest_prices, grams, "cpu")
    plan = plan_budget.fn(root, full, None, prices, BUDGET, BudgetPolicy(), toolchain)
    held = rungs_of(load_plan(plan), read_tensors(full.path("model.gguf")), rungs)
    anew = {name: compensate_rung.fn(root, name, full, rungs[name], held[name], grams, "cpu") for name in held}
    provenance = {"version": "1"}
    nearest = assemble.fn(root, "it", full, plan, rungs, {}, provenance)
    done = assemble.fn(root, "it", full, plan, rungs, anew, provenance)
    whole = compensate.fn(root, "it", full, plan, nearest, grams, "cpu")
    return dict(
        full=full, nearest_prices=nearest_prices, prices=prices, plan=plan, nearest=nearest, compensated=done,
        whole=whole, **{f"{name} anew": made for name, made in anew.items()},
    )  # fmt: skip


def test_the_plan_says_how_it_is_rounded_and_costs_less(made):
    plan = load_plan(made["plan"])
    assert plan.rounding == "compensated"
    cost, before = (plan_cost(load_prices(made[name]), plan.types) for name in ("prices", "nearest_prices"))
    assert plan.predicted_kl_nats == cost.value < 0.9 * before.value


def test_the_gguf_is_the_plans_and_described(made):
    plan, gguf = load_plan(made["plan"]), made["compensated"].path("model.gguf")
    audit(gguf, plan)
    model = QuantizedModel.load(made["compensated"].path(MODEL_NAME))
    assert model.sha256 == file_sha256(gguf) != file_sha256(made["nearest"].path("model.gguf"))
    assert model.metadata == {key: v for key, v in read_metadata(gguf).items() if key.startswith("samq.")}
    assert model.metadata["samq.plan"] == plan.digest() and model.metadata["samq.version"] == "1"
    errors = Compensation.load(made["whole"].path(COMPENSATION_NAME)).tensors
    assert {"output.weight", "blk.1.ffn_down.weight"} <= errors.keys()


def test_a_copy_of_compensated_tensors_is_what_compensating_the_whole_file_gives(made):
    """So a plan costs a copy, whatever other plans have rounded anew before."""
    assert made["compensated"].files["model.gguf"].sha256 == made["whole"].files["model.gguf"].sha256
    plan, wholes = load_plan(made["plan"]), Compensation.load(made["whole"].path(COMPENSATION_NAME)).tensors
    parts = {name.removesuffix(" anew"): part for name, part in made.items() if name.endswith(" anew")}
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


def test_it_is_nearer_to_full_precision_on_other_text(made):
    exact = logits_of(made["full"].path("model.gguf"))
    nearest, compensated = (
        (exact.exp() * (exact - logits_of(made[name].path("model.gguf")))).sum(-1).mean().item()
        for name in ("nearest", "compensated")
    )
    assert 0 < compensated < 0.95 * nearest
