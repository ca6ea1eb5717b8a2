from dataclasses import replace

import pytest

from samq.report.markdown_report import markdown_report, verdict
from samq.report.table import PREDICTED, choice_table
from samq.sweep.selection import Comparison, Failure, SelectionRule
from tests.samq.sweeps import check_of, make_sweep, with_results

SAME_BYTES = "At the same bytes"


@pytest.fixture
def sweep(sweep):
    """The sweep without its failure, under a rule that lets its larger plans be the best."""
    return replace(sweep, failures=(), rule=SelectionRule(max_size_ratio=1.6))


def section(text, title):
    """The lines of a report under a heading."""
    return text.split(f"## {title}\n")[1].split("\n## ")[0].strip().splitlines()


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_a_rung_or_a_check_that_failed_is_among_the_failures_and_no_candidate(sweep):
    failures = (Failure("threshold-0.9", "quantize", "it ended"), Failure("Q2_K", "ladder", "it hung"))
    text = markdown_report(replace(sweep, failures=(*failures, Failure("Q4_K_M", "check", "out of memory"))))
    assert "candidates measured, 1 failed\n" in text and "- **Q4_K_M** in check: out of memory" in text


def test_markdown_says_what_is_best_and_why_and_what_fell_out(sweep):
    failure = Failure("threshold-0.9", stage="quantize", reason="llama-quantize ended with\ncode 1 | see log")
    text, best = markdown_report(replace(sweep, failures=(failure,))), sweep.best
    assert text.startswith("# SmolLM2-135M-Instruct: 7 candidates measured, 1 failed\n\n" + best.name)
    against = sweep.comparison(best.name, "Q4_K_M")
    assert f"Against Q4_K_M: {against.in_words}, +8.5 % bytes." in text
    assert f"| ★ | {best.name} |" in text
    assert "- **threshold-0.9** in quantize: llama-quantize ended with code 1 | see log" in text
    assert "- memory/measured_vram_bytes (7 of 7): no NVIDIA GPU" in text
    assert "llama-cpp-python 0.3.36, build 0123456789ab" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(row.endswith("|") for row in rows)


def test_the_report_begins_with_the_verdict_and_the_table_that_people_choose_by(sweep):
    _, first, second, third, *_ = markdown_report(sweep).split("\n\n")
    assert (first, second, third) == (verdict(sweep), choice_table(sweep), f"## {SAME_BYTES}")
    titles = [line for line in markdown_report(sweep).splitlines() if line.startswith("## ")]
    assert titles[:3] == [f"## {SAME_BYTES}", "## Full precision, uniform and mixed", "## All figures"]
    assert titles[-2:] == ["## Plans", "## Made from"]


def test_markdown_says_where_the_vision_part_is(sweep, tmp_path):
    assert "mmproj" not in markdown_report(sweep)
    mmproj = tmp_path / "mmproj.gguf"
    text = markdown_report(replace(sweep, made_from=replace(sweep.made_from, mmproj=mmproj)))
    line = f"- vision or audio part: `{mmproj}`, for `llama-server -m MODEL.gguf --mmproj`"
    assert line in section(text, "Made from")


def test_markdown_explains_who_could_not_be_the_best(sweep):
    text = markdown_report(replace(sweep, rule=SelectionRule()))
    large = sweep.result("threshold-0.2").bytes / sweep.result("Q4_K_M").bytes
    assert f"| threshold-0.2 | {large:.3f} times the size of Q4_K_M, over 1.1 |" in section(text, "Not eligible")
    assert "## Failed" not in text


def test_markdown_says_which_mixture_a_plan_does_not_beat(sweep):
    text, tie = markdown_report(sweep), sweep.comparison("threshold-0.4", "Q5_K_M")
    assert tie.verdict == "tie"
    assert f"| threshold-0.4 | does not beat Q5_K_M with confidence: {tie.in_words} |" in section(text, "Not eligible")
    rule = "A SAMQ plan is eligible only if it beats every stock mixture of its size or smaller at 95 % confidence."
    assert rule in text


def test_at_the_same_bytes_each_mixture_is_held_against_the_plans_of_its_size(sweep):
    heads, _, *rows = section(markdown_report(sweep), SAME_BYTES)[2:]
    large, small = (dict(zip(cells(heads), cells(row), strict=True)) for row in rows)
    assert large["mixture, bytes"] == f"Q5_K_M, {sweep.result('Q5_K_M').bytes:,}"
    stock, plan, other = map(sweep.result, ("Q4_K_M", "budget-size-of-Q4_K_M", "budget-size-of-Q5_K_M"))
    assert large["candidate, bytes"] == f"{other.name}, {other.bytes:,} (-0.1 %)"
    assert small["candidate, bytes"] == f"{plan.name}, {plan.bytes:,} (+0.0 %)"
    assert small["mean KLD (nats)"] == f"{stock.kld.value:.5f} → {plan.kld.value:.5f}"
    p999 = [one.evaluation.metrics["fidelity/kld_p999_nats"].value for one in (stock, plan)]
    assert small["99.9 % KLD (nats)"] == "{:.4f} → {:.4f}".format(*p999)
    assert small[PREDICTED] == f"{plan.predicted.value:.5f} ± {plan.predicted.stderr:.5f}"
    won = sweep.comparison(plan.name, "Q4_K_M")
    assert small["change of mean KLD"] == won.in_words.replace(" mean KLD", "")
    assert small["verdict"] == "**wins**"


@pytest.mark.parametrize(
    ("interval", "said"), [((-0.1, 0.1), "no difference"), ((-0.2, -0.1), "loses"), (None, "not compared")]
)
def test_the_verdict_is_no_win_where_the_interval_holds_zero(sweep, interval, said):
    name = "budget-size-of-Q4_K_M"
    comparisons = (Comparison(name, "Q4_K_M", sum(interval) / 2, *interval),) if interval else ()
    rows = section(markdown_report(replace(sweep, comparisons=comparisons)), SAME_BYTES)
    assert [cells(row)[-1] for row in rows if name in row] == [said]


def test_a_mixture_without_a_plan_of_its_size_has_a_row_that_says_so(sweep):
    results = [result for result in sweep.results if result.name != "budget-size-of-Q5_K_M"]
    large, small = map(cells, section(markdown_report(with_results(sweep, results)), SAME_BYTES)[4:])
    mixture = sweep.result("Q5_K_M")
    kld, p999 = (mixture.evaluation.metrics[f"fidelity/{name}_nats"].value for name in ("mean_kld", "kld_p999"))
    alone = [f"Q5_K_M, {mixture.bytes:,}", "–", f"{kld:.5f}", f"{p999:.4f}", "–", "–", "no plan of its size"]
    assert large == alone
    assert small[1].startswith("budget-size-of-Q4_K_M, ") and small[-1] == "**wins**"


def test_a_plan_whose_size_no_mixture_has_has_a_row_against_the_largest_that_is_no_larger(tmp_path):
    sweep = make_sweep(tmp_path, budgets=("size-of:Q5_K_M", "5.8bpw", "5bpw"))
    words, _, heads, _, *rows = section(markdown_report(sweep), SAME_BYTES)
    assert "part of the change comes from that" in words
    rows = {row["candidate, bytes"]: row for row in (dict(zip(cells(heads), cells(row), strict=True)) for row in rows)}
    between, smallest = sweep.result("budget-5.8bpw"), sweep.result("budget-5bpw")
    stock = sweep.result("Q4_K_M")
    assert between.bytes > stock.bytes > smallest.bytes
    for plan in (between, smallest):  # all mixtures are larger than the smallest plan: it meets the smallest of them
        row = rows[f"{plan.name}, {plan.bytes:,} ({100 * (plan.bytes / stock.bytes - 1):+.1f} %)"]
        comparison = sweep.comparison(plan.name, "Q4_K_M")
        assert row["mixture, bytes"] == f"Q4_K_M, {stock.bytes:,}"
        assert row["mean KLD (nats)"] == f"{stock.kld.value:.5f} → {plan.kld.value:.5f}"
        assert row["change of mean KLD"] == comparison.in_words.replace(" mean KLD", "")
        assert row["verdict"] == {"win": "**wins**", "tie": "no difference", "loss": "loses"}[comparison.verdict]
    assert rows["–"]["mixture, bytes"].startswith("Q4_K_M") and rows["–"]["verdict"] == "no plan of its size"
    assert len(rows) == 4


def test_without_a_measured_mixture_the_report_says_that_budget_plans_are_compared_with_nothing(sweep):
    results = [result for result in sweep.results if result.plan.policy not in ("stock", "threshold")]
    without = replace(with_results(sweep, results), comparisons=(), rule=SelectionRule(reference=None))
    text = markdown_report(without)
    said = "No budget plan is eligible, because no stock mixture was measured to compare it with."
    assert text.split("\n\n")[1] == (
        f"SAMQ chose nothing: no eligible candidate (quantized candidates) has a measured mean KLD. {said}"
    )
    rows = [cells(row) for row in section(text, SAME_BYTES)[4:]]
    plans = [result for result in sweep.results if result.plan.policy == "budget"]
    assert [row[:2] for row in rows] == [["–", f"{plan.name}, {plan.bytes:,}"] for plan in plans[::-1]]
    assert {row[-1] for row in rows} == {"no mixture to compare with"}
    assert said not in markdown_report(sweep) and said not in verdict(replace(sweep, rule=without.rule))


def test_without_plans_of_a_mixtures_size_there_is_no_such_section(sweep):
    results = [result for result in sweep.results if result.plan.policy != "budget"]
    assert SAME_BYTES not in markdown_report(with_results(sweep, results))


def test_checks_of_predictions_are_in_the_report(sweep):
    text = markdown_report(replace(sweep, checks=(check_of(sweep, "budget-size-of-Q4_K_M"),)))
    assert "**budget-size-of-Q4_K_M**: on other samples" in "".join(section(text, "Predicted against measured"))


def test_nothing_chosen_is_said(sweep):
    text = verdict(replace(sweep, rule=SelectionRule(max_bytes=1)))
    assert text.startswith("SAMQ chose nothing: no eligible candidate (quantized candidates no larger than ")


def test_the_reference_is_not_compared_with_itself(sweep):
    stock = replace(sweep, comparisons=(), rule=SelectionRule(max_size_ratio=1.05))
    assert stock.best.name == stock.rule.reference
    assert "Against" not in verdict(stock)


def test_tensors_that_were_not_measured_are_named(sweep):
    assert "not measured**" not in markdown_report(sweep)
    names = list(dict.fromkeys(name for result in sweep.results for name in result.plan.types))
    others = {name: tensor for name, tensor in sweep.sensitivity.tensors.items() if name != names[1]}
    fewer = replace(sweep, sensitivity=sweep.sensitivity.model_copy(update={"tensors": others}))
    assert f"**1 of {len(names)} tensors were not measured** ({names[1]}): torch does not load" in markdown_report(
        fewer
    )
