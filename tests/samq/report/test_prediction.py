import dataclasses

import pytest

from samq.records import Metric
from samq.report.prediction import SECOND_ORDER_LIMIT_NATS, beyond_second_order, prediction_quality, prediction_section
from samq.sensitivity.fisher import Routing
from samq.sweep.selection import by_size
from tests.samq.sweeps import check_of, make_sweep, with_results


def predicted(result, ratio, stderr=None):
    """A copy of a result whose measured KLD is `ratio` times the prediction."""
    value = result.kld.value / ratio
    return dataclasses.replace(result, predicted=Metric(value=value, stderr=stderr))


def test_agreement_is_over_all_candidates_that_were_predicted_and_measured(sweep):
    ratios = {"Q4_K_M": 1.5, "Q5_K_M": 1.0, "threshold-0.2": 0.8}
    known = [predicted(sweep.result(name), ratio) for name, ratio in ratios.items()]
    quality = prediction_quality([sweep.result("F16"), *known, dataclasses.replace(sweep.results[2], predicted=None)])
    assert quality.candidates == 3
    assert (quality.lowest_ratio, quality.highest_ratio) == (pytest.approx(0.8), pytest.approx(1.5))
    assert quality.rank_correlation == pytest.approx(1.0)


def test_rank_correlation_falls_where_ranks_are_changed(sweep):
    ratios = {"Q4_K_M": 10.0, "Q5_K_M": 1.0, "threshold-0.2": 0.1}
    quality = prediction_quality([predicted(sweep.result(name), ratio) for name, ratio in ratios.items()])
    assert quality.rank_correlation < 0


def test_two_candidates_have_no_rank_correlation(sweep):
    assert prediction_quality(sweep.results[:3]) is None
    assert prediction_section(with_results(sweep, sweep.results[:3])) == []


def test_the_report_says_how_well_predictions_did(sweep):
    quality = prediction_quality(sweep.results)
    title, text = prediction_section(sweep)
    assert title == "## Predicted against measured"
    assert (
        f"Over 6 candidates the rank correlation (Spearman) of predicted and measured KL is {quality.rank_correlation:.3f}."
        in text
    )
    assert f"{quality.lowest_ratio:.2f} to {quality.highest_ratio:.2f} times the prediction" in text


def test_the_report_says_which_plans_the_agreement_leaves_out(sweep):
    names = [result.name for result in sweep.results]
    tiny = dataclasses.replace(sweep.results[-1], predicted=Metric(value=9e-5))
    unpriced = dataclasses.replace(sweep.results[-2], predicted=None)
    _, text, omitted, *_ = prediction_section(with_results(sweep, [*sweep.results[:-2], unpriced, tiny]))
    assert text.startswith("Over 4 candidates")
    assert omitted == (
        f"Left out of this: 2 of 6. {names[-1]}: predicted or measured at 0.0001 nats or less, where llama.cpp's own "
        f"rounding of activations is most of what is measured. {names[-2]}: without a prediction, as a type of the plan "
        "has no price."
    )
    _, text, omitted = prediction_section(with_results(sweep, [sweep.results[0], tiny]))
    assert text == "Fewer than three candidates are left to correlate predicted and measured KL over."
    assert omitted.startswith("Left out of this: 1 of 1.")


def test_candidates_beyond_second_order_are_warned_of(tmp_path):
    sweep = make_sweep(tmp_path, worst_nats=0.31, budgets=(), thresholds=())
    assert beyond_second_order(sweep.results) == ["Q4_K_M"]
    assert "**Do not trust the prediction of Q4_K_M**: over 0.3 nats" in prediction_section(sweep)[1]
    low, high = sweep.result("Q5_K_M"), sweep.result("Q4_K_M")
    assert low.kld.value < SECOND_ORDER_LIMIT_NATS < high.kld.value
    assert beyond_second_order([predicted(low, 0.1), predicted(high, 10)]) == ["Q5_K_M", "Q4_K_M"], "either is enough"
    assert beyond_second_order([predicted(low, 1.0)]) == []


def test_plans_by_budget_with_types_that_lengthen_weights_are_warned_of(sweep):
    longer = [dataclasses.replace(result, lengthened={"IQ3_S": 0.0217}) for result in sweep.results]
    names = [result.name for result in by_size(longer) if result.plan.policy == "budget"]
    assert 0 < len(names) < len(longer)
    assert prediction_section(with_results(sweep, longer))[-1] == (
        f"**Against other plans' the prediction of {', '.join(names)} is too low**: rounding to IQ3_S lengthens weights by "
        "2.2 %, and errors of one sign add up where the prediction takes them for noise. What was measured holds."
    )
    assert not any("too low" in part for part in prediction_section(sweep))


def check(sweep, additive, joint, stderr=0.0005):
    """A check of a plan that the table predicts 0.03 nats for."""
    figures = {"predicted": 0.03, "additive": additive, "by_tensor": additive, "joint": joint}
    metrics = {name: Metric(value=value, stderr=stderr) for name, value in figures.items()}
    return check_of(sweep, "budget-size-of-Q4_K_M").model_copy(update=metrics)


@pytest.mark.parametrize(
    ("additive", "joint", "fitted", "left_out", "advice"),
    [
        (0.0305, 0.0310, "+1.7 % (within the error)", "+1.6 % (within the error)", ""),
        (0.0200, 0.0200, "-33.3 % (beyond the error)", "+0.0 % (within the error)", ""),
        (
            *(0.0600, 0.0900, "+100.0 % (beyond the error)", "+50.0 % (beyond the error)"),
            " The plan fits the samples that chose it: calibrate on more.",
        ),
    ],
)
def test_a_check_is_judged_in_words(sweep, additive, joint, fitted, left_out, advice):
    *_, judgement = prediction_section(dataclasses.replace(sweep, checks=(check(sweep, additive, joint),)))
    assert judgement == (
        f"- **budget-size-of-Q4_K_M**: on other samples it costs {fitted} against the table; the terms that the table "
        f"leaves out change that by {left_out}.{advice}"
    )


def test_a_check_of_compensated_rounding_is_judged_with_the_terms_within_tensors(sweep):
    compensated_check = check(sweep, 0.0600, 0.0310).model_copy(
        update={"rounding": "compensated", "by_tensor": Metric(value=0.0305, stderr=0.0005)}
    )
    *_, explained, _, judgement = prediction_section(dataclasses.replace(sweep, checks=(compensated_check,)))
    assert explained.endswith("is to be compared with the cost within tensors.")
    assert "it costs +1.7 % (within the error) against the table" in judgement
    assert "leaves out change that by +1.6 % (within the error)." in judgement and "calibrate on more" not in judgement


def test_a_checks_figures_stand_beside_the_measured(sweep):
    *_, table, _ = prediction_section(dataclasses.replace(sweep, checks=(check(sweep, 0.031, 0.032),)))
    kld = sweep.result("budget-size-of-Q4_K_M").kld
    assert table.splitlines()[-1] == (
        "| budget-size-of-Q4_K_M | 0.03000 ± 0.00050 | 0.03100 ± 0.00050 | 0.03100 ± 0.00050 | 0.03200 ± 0.00050 "
        f"| {kld.value:.5f} ± {kld.stderr:.5f} | 32 (5000 tokens) |"
    )


def test_a_check_of_a_plan_that_rounds_nothing_is_no_error(sweep):
    *_, judgement = prediction_section(dataclasses.replace(sweep, checks=(check(sweep, 0.0, 0.0),)))
    assert judgement == "- **budget-size-of-Q4_K_M** rounds nothing."


def test_of_a_mixture_of_experts_the_report_says_what_the_prediction_leaves_out(sweep):
    dense = "\n".join(prediction_section(sweep))
    assert "experts" not in dense
    mixture = dataclasses.replace(sweep, routing=Routing(16, {"blk.1": {3: 0, 7: 41}}))
    report = "\n".join(prediction_section(mixture))
    assert "its predictions are too low" in report
    assert (
        "**2 of 16 experts saw fewer than 64 calibration tokens (blk.1: 3 saw none, 7 saw 41).** What their weights cost is "
        in report
    )
    assert "saw no" not in "\n".join(prediction_section(dataclasses.replace(sweep, routing=Routing(16))))
