"""What a plan's GGUF is put together from, as pure functions of plans, tensors and the names of rungs."""

import pytest

from samq.gguf.file import TensorInfo
from samq.quantization.recipes import recipes, tensors_to_compensate
from samq.records import Plan

TENSORS = {
    name: TensorInfo(name, shape, "F16", 2 * shape[0] * shape[1])
    for name, shape in {"up": (8, 256), "down": (8, 256), "short": (8, 96)}.items()
}


def plan(rounding="nearest", **types):
    """A plan of these types; what is not named stays as it is."""
    return Plan(
        name="p", policy="budget", parameters={}, types=dict.fromkeys(TENSORS, "F16") | types, tensor_bytes=1, weights=1,
        gguf_sha256="", rounding=rounding,
    )  # fmt: skip


def recipe(plan, *rungs):
    return recipes({"p": plan}, TENSORS, rungs)["p"]


def test_a_plan_whose_tensors_the_ladder_holds_is_copied_from_the_rungs_it_needs_and_no_other():
    mixed = plan(up="Q4_K", down="Q6_K")
    assert recipe(mixed, "Q3_K", "Q4_K", "Q6_K").copied == {"Q4_K": ("up",), "Q6_K": ("down",)}
    assert recipe(plan(up="Q4_K", down="Q4_K"), "Q4_K", "Q6_K").copied == {"Q4_K": ("up", "down")}
    assert recipe(mixed, "Q4_K", "Q6_K").plan is mixed


def test_a_rung_gives_short_rows_the_type_that_they_fall_back_to():
    assert recipe(plan(short="Q5_0"), "Q4_K").copied == {"Q4_K": ("short",)}


@pytest.mark.parametrize("rungs", [(), ("Q4_K",), ("Q6_K", "Q8_0")])
def test_a_plan_of_which_the_ladder_lacks_a_tensor_is_copied_from_nothing(rungs):
    assert recipe(plan(up="Q4_K", down="Q6_K"), *rungs).copied == {}


def test_each_plan_has_a_recipe_by_its_name_also_if_rungs_can_be_read_once_only():
    plans = {"one": plan(up="Q4_K"), "other": plan(up="Q6_K"), "lacking": plan(up="Q8_0")}
    copied = {name: made.copied for name, made in recipes(plans, TENSORS, iter(["Q4_K", "Q6_K"])).items()}
    assert copied == {"one": {"Q4_K": ("up",)}, "other": {"Q6_K": ("up",)}, "lacking": {}}


def test_tensors_of_compensated_plans_that_share_a_rung_are_compensated_once():
    plans = {
        "small": plan("compensated", up="Q4_K", down="Q4_K"),
        "large": plan("compensated", up="Q4_K", down="Q6_K", short="Q5_0"),
        "nearest": plan(up="Q8_0", down="Q8_0"),
    }
    together = recipes(plans, TENSORS, ["Q4_K", "Q6_K", "Q8_0"])
    assert {name: made.compensated for name, made in together.items()} == {
        "small": True, "large": True, "nearest": False,
    }  # fmt: skip
    tensors = tensors_to_compensate(together.values())
    assert tensors == {"Q4_K": ["down", "short", "up"], "Q6_K": ["down"]}
    assert list(tensors) == ["Q4_K", "Q6_K"]
    assert tensors_to_compensate(reversed(together.values())) == tensors, "the order of plans is in no key"


def test_without_rungs_nothing_is_compensated_before_it_is_quantized():
    assert tensors_to_compensate(recipes({"p": plan("compensated", up="Q4_K")}, TENSORS, ()).values()) == {}
    assert tensors_to_compensate([]) == {}
