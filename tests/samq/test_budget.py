import itertools

import numpy as np
import pytest

from samq.allocation import Target
from samq.budget import Budget, BudgetPolicy, budget_plan, parse_budget, solve, undominated, why_doubted
from samq.errors import SamqError
from samq.formats import tensor_bytes
from samq.prediction import SECOND_ORDER_LIMIT_NATS
from samq.records import Price, PriceTable, TensorPrices
from tests.samq.serving.tiny_chat import write_chat_gguf

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q6_K", "F16")


def random_options(seed, tensors, types=5):
    random = np.random.default_rng(seed)
    sizes = random.integers(1, 50, (tensors, types)) * 32
    costs = random.lognormal(0, 3, (tensors, types))
    return {
        f"tensor{row}": {
            str(kind): Price(bytes=int(sizes[row, kind]), kl_nats=costs[row, kind]) for kind in range(types)
        }
        for row in range(tensors)
    }


def cost_and_bytes(options, types):
    chosen = [options[name][kind] for name, kind in types.items()]
    return sum(price.kl_nats for price in chosen), sum(price.bytes for price in chosen)


def best_of_all(options, limit):
    return min(
        sum(price.kl_nats for price in choice)
        for choice in itertools.product(*(types.values() for types in options.values()))
        if sum(price.bytes for price in choice) <= limit
    )


@pytest.mark.parametrize("seed", range(40))
def test_the_solution_is_the_best_of_all_choices(seed):
    options = random_options(seed, tensors=6, types=4)
    smallest = sum(min(price.bytes for price in types.values()) for types in options.values())
    largest = sum(max(price.bytes for price in types.values()) for types in options.values())
    for limit in np.linspace(smallest, largest, 5).astype(int):
        cost, size = cost_and_bytes(options, solve(options, int(limit)).types)
        assert size <= limit
        assert cost == pytest.approx(best_of_all(options, limit), rel=1e-12)


def test_a_larger_budget_never_costs_more():
    options = random_options(0, tensors=60)
    smallest = sum(min(price.bytes for price in types.values()) for types in options.values())
    costs = [
        cost_and_bytes(options, solve(options, limit).types)[0]
        for limit in range(smallest, 3 * smallest, smallest // 40)
    ]
    assert all(after <= before for before, after in itertools.pairwise(costs))


def test_dominated_types_are_left_out():
    types = {
        "small": Price(bytes=10, kl_nats=3.0),
        "worse": Price(bytes=12, kl_nats=3.5),
        "dearer": Price(bytes=20, kl_nats=3.0),
        "large": Price(bytes=30, kl_nats=1.0),
    }
    assert list(undominated(types)) == ["small", "large"]


@pytest.fixture(scope="module")
def target(tiny_gguf, toolchain):
    return Target.open(tiny_gguf, toolchain)


@pytest.fixture(scope="module")
def prices(target):
    random = np.random.default_rng(0)
    tensors = {}
    for name, tensor in target.quantizable.items():
        weight = random.lognormal()
        types = {
            kind: Price(bytes=tensor_bytes(kind, tensor.shape), kl_nats=weight * 4.0**-index if kind != "F16" else 0.0)
            for index, kind in enumerate(TYPES)
        }
        tensors[name] = TensorPrices(types=types, shares=(0.5, 0.3, 0.2))
    return PriceTable(
        gguf_sha256=target.sha256, map_digest="map", imatrix_sha256=None, sequence_tokens=(10, 10, 10), tensors=tensors
    )


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
    overhead = target.gguf.stat().st_size - sum(tensor.bytes for tensor in target.tensors.values())
    assert parse_budget("4.5bpw", target).tensor_bytes == int(4.5 * weights / 8)
    assert 0 < 3 * 2**20 - overhead - parse_budget("3MiB", target).tensor_bytes < 2**15
    assert parse_budget("1.5GB", target).tensor_bytes - parse_budget("0.5 GB", target).tensor_bytes == 10**9
    for text in ("", "4.5", "much", "4.5bpx", "size-of:", "vram:24GiB", "-3GB"):
        if text != "4.5":
            with pytest.raises(SamqError, match="is not a budget"):
                parse_budget(text, target)


def test_a_vram_budget_leaves_room_for_the_cache_in_its_type(toolchain, tmp_path):
    target = Target.open(write_chat_gguf(tmp_path / "tiny.gguf"), toolchain)
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


def test_an_impossible_budget_says_what_is_possible(target, prices):
    with pytest.raises(SamqError, match=r"the smallest plan has [\d,]+ \(2\.\d\d bits per weight\)"):
        budget_plan(target, prices, Budget("1000B", 1000), BudgetPolicy())


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
    doubt = why_doubted(budget_plan(target, prices.model_copy(update={"tensors": scaled}), budget, BudgetPolicy()))
    assert bool(doubt) == doubted
    if doubt:
        assert "a predicted KL of 0.33 nats is over 0.3" in doubt


def test_guards_are_least_types(target, prices):
    budget = parse_budget("4bpw", target)
    policy = BudgetPolicy(output_guard="q6_k", least_type="Q3_K")
    plan = budget_plan(target, prices, budget, policy)
    assert plan.types["output.weight"] in ("Q6_K", "F16")
    assert "Q2_K" not in plan.types.values()


def test_what_a_budget_does_not_count_costs_nothing(target, prices):
    budget = Budget("vram:1GiB@512", parse_budget("3bpw", target).tensor_bytes, frozenset({"token_embd.weight"}))
    plan = budget_plan(target, prices, budget, BudgetPolicy())
    assert plan.types["token_embd.weight"] == "F16"
    assert plan.tensor_bytes - target.tensors["token_embd.weight"].bytes <= budget.tensor_bytes
