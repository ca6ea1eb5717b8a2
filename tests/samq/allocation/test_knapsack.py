import itertools

import numpy as np
import pytest

from samq.allocation.knapsack import solve, undominated
from samq.records import Price


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
