import itertools
import re
from decimal import Decimal

import numpy as np
import pytest

from samq.allocation.budget import Budget, BudgetPolicy, budget_plan, parse_budget, why_doubted
from samq.allocation.budget_notation import read_budget
from samq.allocation.target import OpenTarget
from samq.errors import SamqError
from samq.files import GGUF_NAME
from samq.gguf.formats import tensor_bytes
from samq.llamacpp.memory import predict_memory
from samq.llamacpp.quantize import quantize
from samq.records import Price, PriceTable, TensorPrices
from samq.report.prediction import SECOND_ORDER_LIMIT_NATS
from tests.conftest import write_tiny_gguf
from tests.samq.serving.tiny_chat import add_byte_vocabulary, write_chat_gguf

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "F16")


@pytest.fixture(scope="module")
def target(tiny_gguf, toolchain):
    return OpenTarget.open(tiny_gguf, toolchain)


def random_prices(target, types=TYPES):
    random = np.random.default_rng(0)
    tensors = {}
    for name, tensor in target.quantizable.items():
        weight = random.lognormal()
        priced = {
            kind: Price(bytes=tensor_bytes(kind, tensor.shape), kl_nats=weight * 4.0**-index if kind != "F16" else 0.0)
            for index, kind in enumerate(types)
        }
        tensors[name] = TensorPrices(types=priced, shares=(0.5, 0.3, 0.2))
    return PriceTable(
        gguf_sha256=target.full.sha256,
        map_digest="map",
        imatrix_sha256=None,
        sequence_tokens=(10, 10, 10),
        tensors=tensors,
    )


@pytest.fixture(scope="module")
def prices(target):
    return random_prices(target)


def test_a_plan_keeps_to_the_size_of_a_mixture_and_says_what_it_costs(target, prices):
    budget = parse_budget("size-of:Q4_K_M", target)
    plan = budget_plan(target, prices, budget, BudgetPolicy())
    assert plan.tensor_bytes <= budget.tensor_bytes
    assert plan.predicted_kl_nats == pytest.approx(
        sum(prices.tensors[name].types[kind].kl_nats for name, kind in plan.types.items())
    )
    # the sequences' parts are 0.5, 0.3 and 0.2 of the cost, each expected to be a third
    spread = np.std([0.5, 0.3, 0.2], ddof=1) * np.sqrt(3)
    assert plan.predicted_kl_stderr == pytest.approx(spread * plan.predicted_kl_nats)
    assert plan.solver_gap == pytest.approx(0, abs=1e-9)


def test_budgets_are_read_as_they_are_written(target):
    weights = sum(tensor.weights for tensor in target.tensors.values())
    overhead = target.full.path.stat().st_size - sum(tensor.bytes for tensor in target.tensors.values())
    assert parse_budget("4.5bpw", target).tensor_bytes == int(4.5 * weights / 8)
    assert 0 < 3 * 2**20 - overhead - parse_budget("3MiB", target).tensor_bytes < 2**15
    assert parse_budget("1.5GB", target).tensor_bytes - parse_budget("0.5 GB", target).tensor_bytes == 10**9
    for text in ("", "4.5", "much", "4.5bpx", "size-of:", "vram:24GiB", "-3GB"):
        if text != "4.5":
            with pytest.raises(SamqError, match="is not a budget"):
                parse_budget(text, target)


def test_a_vram_budget_leaves_room_for_the_cache_in_its_type(toolchain, tmp_path):
    target = OpenTarget.open(write_chat_gguf(tmp_path / "tiny.gguf"), toolchain)
    values = 2 * 2 * 64 * 8192  # K and V, blocks, values a token, tokens
    budgets = [parse_budget(f"vram:1GiB@8192{kind}", target) for kind in ("", "/F16", "/Q8_0", "/Q4_0")]
    default, f16, q8_0, q4_0 = (budget.tensor_bytes for budget in budgets)
    assert default == f16 < 2**30 - 2 * values
    assert q8_0 - f16 == pytest.approx(values * (2 - 34 / 32), rel=0.05)
    assert q4_0 - f16 == pytest.approx(values * (2 - 18 / 32), rel=0.05)
    assert {budget.free for budget in budgets} == {frozenset({"token_embd.weight"})}


def test_a_context_of_no_tokens_is_no_budget(target):
    for text in ("vram:24GiB@0", "vram:24GiB@99999999999", "vram:24GiB@512/Q5_0"):
        with pytest.raises(SamqError, match="is not a budget"):
            parse_budget(text, target)


def smallest_possible(text, target, prices):
    """The budget that the refusal of this one calls the smallest possible."""
    with pytest.raises(SamqError, match="the smallest possible is") as refused:
        budget_plan(target, prices, parse_budget(text, target), BudgetPolicy())
    said = re.fullmatch(
        rf"a budget of {re.escape(text)} is too small for this model: "
        r"in these types the smallest possible is (\S+?)(?:, or (\S+bpw))?; give .*",
        str(refused.value),
    )
    return said[1], said[2]


def a_little_less(text):
    """The budget with its number one less in the last digit."""
    digits = re.search(r"\d+(\.\d+)?", text)[0]
    last = Decimal(1).scaleb(Decimal(digits).as_tuple().exponent)
    return text.replace(digits, str(Decimal(digits) - last), 1)


@pytest.mark.parametrize(
    ("budget", "form"),
    [
        ("1000B", r"\d{6}B"),
        ("1000", r"\d{6}"),
        ("0.1KiB", r"\d{3}\.\d\dKiB"),
        ("0.0001GB", r"0\.000\d+GB"),
        ("1bpw", r"2\.\d{1,4}bpw"),
        ("vram:1B@512", r"vram:\d{7}B@512"),
        ("vram:0.001MB@512/Q8_0", r"vram:\d\.\d{1,4}MB@512/Q8_0"),
    ],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_impossible_budget_says_the_smallest_possible_as_it_was_written(loadable, budget, form, tied):
    target, prices = loadable[tied]
    smallest, _ = smallest_possible(budget, target, prices)
    assert re.fullmatch(form, smallest)
    budget_plan(target, prices, parse_budget(smallest, target), BudgetPolicy())  # refuses nothing
    assert smallest_possible(a_little_less(smallest), target, prices)[0] == smallest


def test_the_smallest_possible_mixture_is_one_with_room_when_the_next_smaller_has_none(target):
    prices = random_prices(target, ("Q4_K", "Q6_K"))
    mixture, bits = smallest_possible("size-of:IQ4_XS", target, prices)
    assert mixture == "size-of:IQ4_NL", "4.5 bits per weight, as Q4_K, where IQ4_XS has 4.25"
    assert bits == smallest_possible("1bpw", target, prices)[0]
    for smallest in (mixture, bits):
        budget_plan(target, prices, parse_budget(smallest, target), BudgetPolicy())


def test_sizes_are_read_to_the_last_byte():
    assert read_budget("0.29MB").bytes == 290_000
    assert read_budget("1.001KB").bytes == 1001
    assert read_budget("4.35GB").bytes == 4_350_000_000


@pytest.fixture(scope="module")
def loadable(toolchain, tmp_path_factory):
    """Whether embeddings are tied -> a model that llama.cpp can load, and prices of its tensors."""
    folder = tmp_path_factory.mktemp("loadable")
    cases = {}
    for tied in (False, True):
        path = folder / f"{tied}.gguf"
        write_tiny_gguf(path, vocabulary=260, tied=tied, add_tokenizer=lambda writer: add_byte_vocabulary(writer, None))
        target = OpenTarget.open(path, toolchain)
        assert target.tied == tied
        cases[tied] = target, random_prices(target)
    return cases


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("room", [0, 500_000])
@pytest.mark.parametrize("kind", ["", "/Q8_0"])
def test_the_gguf_of_a_vram_budget_needs_no_more_vram(loadable, tmp_path, tied, room, kind):
    target, prices = loadable[tied]
    smallest, _ = smallest_possible(f"vram:1B@2048{kind}", target, prices)
    budget = read_budget(smallest).bytes + room
    plan = budget_plan(target, prices, parse_budget(f"vram:{budget}@2048{kind}", target), BudgetPolicy())
    quantize(target.full.path, plan, tmp_path, target.toolchain, provenance={})
    memory = predict_memory(tmp_path / GGUF_NAME, 2048, kv_type=kind.removeprefix("/") or "F16")
    needed = memory["memory/predicted_vram_bytes"].value
    assert 0.95 * budget < needed <= budget
    assert tied or plan.types["token_embd.weight"] == "F16", "what lies in host memory costs nothing"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_gguf_of_a_size_is_no_larger(loadable, tmp_path, tied):
    target, prices = loadable[tied]
    smallest, _ = smallest_possible("1B", target, prices)
    plan = budget_plan(target, prices, parse_budget(smallest, target), BudgetPolicy())
    quantize(target.full.path, plan, tmp_path, target.toolchain, provenance={"model": "x" * 120})
    size = read_budget(smallest).bytes
    assert size - 20_000 < (tmp_path / GGUF_NAME).stat().st_size <= size


def test_bytes_that_would_save_next_to_nothing_are_left_unspent(target, prices):
    exact = {
        name: tensor.model_copy(
            update={"types": {**tensor.types, "Q4_K": tensor.types["Q4_K"].model_copy(update={"kl_nats": 5e-8})}}
        )
        for name, tensor in prices.tensors.items()
    }
    plan = budget_plan(
        target, prices.model_copy(update={"tensors": exact}), parse_budget("16bpw", target), BudgetPolicy()
    )
    assert set(plan.types.values()) == {"Q4_K"}
    assert plan.predicted_kl_nats == pytest.approx(5e-8 * len(exact))


@pytest.mark.parametrize("seed", range(5))
def test_a_larger_budget_never_has_a_larger_predicted_kl(target, prices, seed):
    random = np.random.default_rng(seed)
    small = {
        name: tensor.model_copy(
            update={
                "types": {
                    kind: price.model_copy(update={"kl_nats": 4e-7 * float(random.random()) * (kind != "F16")})
                    for kind, price in tensor.types.items()
                }
            }
        )
        for name, tensor in prices.tensors.items()
    }
    table = prices.model_copy(update={"tensors": small})
    weights = sum(tensor.weights for tensor in target.tensors.values())
    sizes = [Budget(f"{bits}bpw", int(bits * weights / 8)) for bits in np.linspace(3, 9, 120)]
    costs = [budget_plan(target, table, budget, BudgetPolicy()).predicted_kl_nats for budget in sizes]
    assert all(after <= before for before, after in itertools.pairwise(costs))


@pytest.mark.parametrize(("scale", "doubted"), [(0.9, False), (1.1, True)])
def test_a_plan_beyond_second_order_is_doubted(target, prices, scale, doubted):
    budget = parse_budget("4bpw", target)
    cost = budget_plan(target, prices, budget, BudgetPolicy()).predicted_kl_nats
    factor = scale * SECOND_ORDER_LIMIT_NATS / cost
    scaled = {
        name: tensor.model_copy(
            update={
                "types": {
                    kind: price.model_copy(update={"kl_nats": factor * price.kl_nats})
                    for kind, price in tensor.types.items()
                }
            }
        )
        for name, tensor in prices.tensors.items()
    }
    table = prices.model_copy(update={"tensors": scaled})
    doubt = why_doubted(budget_plan(target, table, budget, BudgetPolicy()), table)
    assert bool(doubt) == doubted
    if doubt:
        assert "a predicted KL of 0.33 nats is over 0.3" in doubt


@pytest.mark.parametrize(("change", "doubted"), [(0.0217, True), (0.009, False), (-0.04, False)])
def test_a_plan_with_a_type_that_lengthens_weights_is_doubted(target, prices, change, doubted):
    plan = budget_plan(target, prices, parse_budget("4bpw", target), BudgetPolicy())
    changes = dict.fromkeys(plan.types.values(), 0.0) | {plan.types["output.weight"]: change, "IQ3_S": 0.0217}
    plan = plan.model_copy(update={"predicted_kl_nats": 0.1})
    doubt = why_doubted(plan, prices.model_copy(update={"length_changes": changes}))
    kind = plan.types["output.weight"]
    sentence = (
        f"predictions of plans with {kind} are too low against other plans': rounding to {kind} lengthens weights by 2.2 %, "
        f"and errors of one sign add up where the prediction takes them for noise; leave {kind} out of the ladder, or rely on "
        "what is measured only"
    )
    assert doubt == (sentence if doubted else None)
    assert why_doubted(plan, prices) is None, "a table of before has no lengths"


def test_guards_are_least_types(target, prices):
    budget = parse_budget("4bpw", target)
    policy = BudgetPolicy(output_guard="q6_k", least_type="Q3_K")
    plan = budget_plan(target, prices, budget, policy)
    assert plan.types["output.weight"] in ("Q6_K", "F16")
    assert "Q2_K" not in plan.types.values()


def test_experts_that_saw_few_tokens_get_no_small_type_for_want_of_data(target, prices):
    name = "blk.0.ffn_up.weight"
    cheap = {kind: price.model_copy(update={"kl_nats": 0.0}) for kind, price in prices.tensors[name].types.items()}
    tensors = prices.tensors | {name: prices.tensors[name].model_copy(update={"types": cheap})}
    known = prices.model_copy(update={"tensors": tensors})
    scarce = known.model_copy(update={"scarce_experts": {name: {2: 0}}})
    budget = parse_budget("5bpw", target)
    plan = budget_plan(target, known, budget, BudgetPolicy())
    assert plan.types[name] == "Q2_K" and plan.parameters["expert_guard"] is None
    plan = budget_plan(target, scarce, budget, BudgetPolicy())
    assert plan.types[name] == "Q3_K" == plan.parameters["expert_guard"]
    assert budget_plan(target, scarce, budget, BudgetPolicy(expert_guard="q4_K")).types[name] == "Q4_K"
    assert budget_plan(target, scarce, budget, BudgetPolicy(expert_guard=None)).types[name] == "Q2_K"
    everywhere = known.model_copy(update={"scarce_experts": {name: {2: 0} for name in target.quantizable}})
    with pytest.raises(
        SamqError,
        match=r"or calibrate on more text, since \d+ tensors have experts that saw few tokens and get at least Q3_K",
    ):
        budget_plan(target, everywhere, parse_budget("2.8bpw", target), BudgetPolicy())


def test_a_tensor_that_is_published_in_mxfp4_keeps_it_unless_the_budget_asks(toolchain, tmp_path):
    name = "blk.0.ffn_up.weight"
    target = OpenTarget.open(write_tiny_gguf(tmp_path / "in.gguf", mxfp4=[name]), toolchain)
    prices = random_prices(target)
    own = {"MXFP4": Price(bytes=target.tensors[name].bytes, kl_nats=0.0)}
    types = {kind: price for kind, price in prices.tensors[name].types.items() if kind != "F16"} | own
    tensors = prices.tensors | {name: prices.tensors[name].model_copy(update={"types": types})}
    prices = prices.model_copy(update={"tensors": tensors})
    for budget in ("16bpw", "5bpw"):
        for least in (None, "Q6_K"):
            policy = BudgetPolicy(least_type=least if budget == "16bpw" else None)
            assert budget_plan(target, prices, parse_budget(budget, target), policy).types[name] == "MXFP4"
    assert budget_plan(target, prices, parse_budget("2.8bpw", target), BudgetPolicy()).types[name] in ("Q2_K", "Q3_K")


def test_what_a_budget_does_not_count_costs_nothing(target, prices):
    budget = Budget("vram:1GiB@512", parse_budget("3bpw", target).tensor_bytes, frozenset({"token_embd.weight"}))
    plan = budget_plan(target, prices, budget, BudgetPolicy())
    assert plan.types["token_embd.weight"] == "F16"
    assert plan.tensor_bytes - target.tensors["token_embd.weight"].bytes <= budget.tensor_bytes
