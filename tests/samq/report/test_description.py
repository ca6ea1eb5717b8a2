import pytest

from samq.report.description import describe_plan, substitution_counts, type_counts


def test_threshold_plans_are_described_by_what_they_keep(sweep):
    kept = sweep.result("threshold-0.2").plan
    assert describe_plan(kept) == (
        f"Score above 0.2: {kept.parameters['kept_tensors']} of 29 tensors in 3 groups keep Q8_0; the rest is Q4_K_M."
    )


def test_a_threshold_plan_says_which_type_experts_have_at_least(sweep):
    plan = sweep.result("threshold-0.2").plan
    guarded = plan.model_copy(update={"parameters": {**plan.parameters, "expert_guard": "Q3_K"}})
    said = describe_plan(plan).removesuffix(".") + ", but experts that saw few tokens have at least Q3_K."
    assert describe_plan(guarded) == said


def test_types_and_substitutions_are_counted(sweep):
    stock = sweep.result("Q4_K_M").plan
    assert type_counts(stock) == "29 Q5_0"
    assert substitution_counts(stock) == "29 Q4_K → Q5_0"
    assert substitution_counts(sweep.result("F16").plan) == "none"


def test_a_budget_plan_is_described_by_budget_prediction_and_types(sweep):
    plan = sweep.result("budget-size-of-Q4_K_M").plan
    predicted = f"{plan.predicted_kl_nats:.5f} ± {plan.predicted_kl_stderr:.5f}"
    assert describe_plan(plan) == (
        f"Least predicted KL within the bytes of Q4_K_M: {predicted} nats per token at 5.50 bits per weight, with Q4_0, "
        "Q5_0, Q5_1 and Q8_0."
    )


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("1500MiB", "1500MiB"),
        ("4.5bpw", "4.5 bits per weight"),
        ("size-of:q4_k_m", "the bytes of Q4_K_M"),
        ("vram:24GiB@8192", "24GiB of VRAM at a context of 8192 tokens"),
        ("vram:24GiB@8192/Q8_0", "24GiB of VRAM at a context of 8192 tokens and a KV cache in Q8_0"),
    ],
)
def test_every_form_of_a_budget_can_be_read_aloud(sweep, budget, words):
    plan = sweep.result("budget-size-of-Q4_K_M").plan
    plan = plan.model_copy(update={"parameters": {**plan.parameters, "budget": budget}})
    assert describe_plan(plan).startswith(f"Least predicted KL within {words}: ")


def test_guards_and_a_gap_of_the_solver_are_said(sweep):
    plan = sweep.result("budget-size-of-Q4_K_M").plan
    guarded = {**plan.parameters, "output_guard": "Q6_K", "least_type": "Q4_0", "expert_guard": "Q3_K"}
    plan = plan.model_copy(update={"parameters": guarded, "solver_gap": 0.012, "types": {"output.weight": "Q8_0"}})
    assert describe_plan(plan).endswith(
        "bits per weight, with Q8_0; the output at least Q6_K, experts that saw few tokens at least Q3_K, every tensor at least "
        "Q4_0; the best may be 1.2 % lower."
    )


def test_compensated_rounding_is_said(sweep):
    plan = sweep.result("budget-size-of-Q4_K_M").plan
    said = describe_plan(plan.model_copy(update={"rounding": "compensated"}))
    assert said == describe_plan(plan).removesuffix(".") + "; rounding errors cancel each other."


def test_a_uniform_plan_names_its_type(sweep):
    plan = sweep.result("Q4_K_M").plan.model_copy(
        update={"policy": "uniform", "name": "uniform-Q4_K", "parameters": {"type": "Q4_K"}}
    )
    assert describe_plan(plan) == "Every tensor in Q4_K, or in what its rows allow."
