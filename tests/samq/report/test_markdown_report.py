import dataclasses
import io
import math

import pytest
from rich.console import Console

from samq.records import Metric
from samq.report.markdown_report import markdown_report, verdict
from samq.report.table import COLUMNS, PREDICTED, results_table, terminal_table
from samq.sweep.selection import KLD, Comparison, Failure, SelectionRule, choose
from tests.samq.sweeps import make_sweep

RULE = SelectionRule(max_size_ratio=1.6)
SAME_BYTES = "At the same bytes"


def report(sweep, best=None, results=None, failures=(), rule=RULE, comparisons=(), checks=()):
    made_from = (sweep.source, sweep.calibration, sweep.heldout, sweep.toolchain)
    results = sweep.results if results is None else results
    return markdown_report(*made_from, results, failures, best, rule, comparisons, checks)


def section(text, title):
    """The lines of a report under a heading."""
    return text.split(f"## {title}\n")[1].split("\n## ")[0].strip().splitlines()


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def without(result, metric):
    """A copy of a result in which a metric was not measured."""
    metrics = {name: value for name, value in result.evaluation.metrics.items() if name != metric}
    return dataclasses.replace(result, evaluation=result.evaluation.model_copy(update={"metrics": metrics}))


def test_the_table_has_every_candidate_by_size_with_units_and_errors(sweep):
    table = results_table(sweep.results, sweep.failures).set_index("candidate")
    ordered = ["F16", "threshold-0.2", "threshold-0.4", "Q5_K_M", "budget-size-of-Q5_K_M", "Q4_K_M"]
    assert list(table.index) == [*ordered, "budget-size-of-Q4_K_M", "threshold-0.9"]
    row, result = table.loc["threshold-0.2"], sweep.result("threshold-0.2")
    assert row["size (MB)"] == result.bytes / 1e6
    assert row["mean KLD (nats)"] == result.kld.value
    assert row["± mean KLD (nats)"] == result.kld.stderr
    assert row["threshold"] == 0.2
    assert table["kept tensors"].dropna().is_monotonic_decreasing
    assert (row[PREDICTED], row[f"± {PREDICTED}"]) == (result.predicted.value, result.predicted.stderr)
    assert table.loc["budget-size-of-Q4_K_M", "budget"] == "size-of:Q4_K_M"
    assert "± p99 latency (ms)" not in table, "no candidate has a standard error there"
    assert table.loc["threshold-0.9", "status"] == "failed in quantize: llama-quantize ended with code 1 | see log"


def test_a_column_that_no_candidate_has_is_left_out(sweep):
    bare = [dataclasses.replace(r, predicted=None) for r in sweep.results if r.plan.policy in ("full", "stock")]
    assert not {"budget", "threshold", PREDICTED, f"± {PREDICTED}"} & set(results_table(bare, []))


def test_what_was_not_measured_is_nan_in_the_table_and_a_dash_for_people(sweep):
    results = [without(sweep.results[0], "json/valid_percent"), *sweep.results[1:]]
    table = results_table(results, []).set_index("candidate")
    assert math.isnan(table.loc["F16", "JSON valid (%)"])
    json_column = next(column for column in COLUMNS if column.metric == "json/valid_percent")
    assert json_column.show(results[0].evaluation) == "–"
    assert json_column.show(results[1].evaluation, spread=True).count(".") == 3, "value and interval"


def test_a_rung_or_a_check_that_failed_is_among_the_failures_and_no_candidate(sweep):
    failures = [*sweep.failures, Failure("Q2_K", "ladder", "it hung"), Failure("Q4_K_M", "check", "out of memory")]
    assert list(results_table(sweep.results, failures)["candidate"]) == list(
        results_table(sweep.results, sweep.failures)["candidate"]
    )
    text = report(sweep, failures=failures)
    assert "candidates measured, 1 failed\n" in text and "- **Q4_K_M** in check: out of memory" in text
    assert terminal_table(sweep.results, failures, None).row_count == len(sweep.results) + 1


def test_markdown_says_what_is_best_and_why_and_what_fell_out(sweep):
    comparisons = sweep.comparisons
    best = choose(sweep.results, RULE, comparisons)
    text = report(sweep, best, failures=sweep.failures, comparisons=comparisons)
    assert text.startswith("# SmolLM2-135M-Instruct: 7 candidates measured, 1 failed\n\n" + best.name)
    (against,) = (one for one in comparisons if (one.candidate, one.rival) == (best.name, "Q4_K_M"))
    assert f"Against Q4_K_M: {against.in_words}, +8.5 % bytes." in text
    assert f"| ★ | {best.name} |" in text
    assert "- **threshold-0.9** in quantize: llama-quantize ended with code 1 | see log" in text
    assert "- memory/measured_vram_bytes (7 of 7): no NVIDIA GPU" in text
    assert "llama-cpp-python 0.3.36, build 0123456789ab" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(row.endswith("|") for row in rows)


def test_markdown_explains_who_could_not_be_the_best(sweep):
    text = report(sweep, rule=SelectionRule(), comparisons=sweep.comparisons)
    large = sweep.result("threshold-0.2").bytes / sweep.result("Q4_K_M").bytes
    assert f"| threshold-0.2 | {large:.3f} times the size of Q4_K_M, over 1.1 |" in text
    assert "## Failed" not in text


def test_markdown_says_which_mixture_a_plan_does_not_beat(sweep):
    text = report(sweep, sweep.result("Q4_K_M"), comparisons=sweep.comparisons)
    (tie,) = (one for one in sweep.comparisons if (one.candidate, one.rival) == ("threshold-0.4", "Q5_K_M"))
    assert tie.verdict == "tie"
    assert f"| threshold-0.4 | does not beat Q5_K_M with confidence: {tie.in_words} |" in text
    assert "is eligible only if it beats, with confidence, all mixtures that are no larger or of its size." in text


def test_at_the_same_bytes_each_mixture_is_held_against_the_plans_of_its_size(sweep):
    heads, _, *rows = section(report(sweep, comparisons=sweep.comparisons), SAME_BYTES)[2:]
    large, small = (dict(zip(cells(heads), cells(row), strict=True)) for row in rows)
    assert large["mixture, bytes"] == f"Q5_K_M, {sweep.result('Q5_K_M').bytes:,}"
    stock, plan, other = map(sweep.result, ("Q4_K_M", "budget-size-of-Q4_K_M", "budget-size-of-Q5_K_M"))
    assert large["candidate, bytes"] == f"{other.name}, {other.bytes:,} (-0.1 %)"
    assert small["candidate, bytes"] == f"{plan.name}, {plan.bytes:,} (+0.0 %)"
    assert small["mean KLD (nats)"] == f"{stock.kld.value:.5f} → {plan.kld.value:.5f}"
    p999 = [one.evaluation.metrics["fidelity/kld_p999_nats"].value for one in (stock, plan)]
    assert small["99.9 % KLD (nats)"] == "{:.4f} → {:.4f}".format(*p999)
    assert small[PREDICTED] == f"{plan.predicted.value:.5f} ± {plan.predicted.stderr:.5f}"
    (won,) = (one for one in sweep.comparisons if (one.candidate, one.rival) == (plan.name, "Q4_K_M"))
    assert small["change of mean KLD"] == won.in_words.replace(" mean KLD", "")
    assert small["verdict"] == "**wins**"


@pytest.mark.parametrize(
    ("interval", "said"), [((-0.1, 0.1), "no difference"), ((-0.2, -0.1), "loses"), (None, "not compared")]
)
def test_the_verdict_is_no_win_where_the_interval_holds_zero(sweep, interval, said):
    name = "budget-size-of-Q4_K_M"
    comparisons = [Comparison(name, "Q4_K_M", sum(interval) / 2, *interval)] if interval else []
    rows = section(report(sweep, comparisons=comparisons), SAME_BYTES)
    assert [cells(row)[-1] for row in rows if name in row] == [said]


def test_a_mixture_without_a_plan_of_its_size_has_a_row_that_says_so(sweep):
    results = [result for result in sweep.results if result.name != "budget-size-of-Q5_K_M"]
    large, small = map(cells, section(report(sweep, results=results, comparisons=sweep.comparisons), SAME_BYTES)[4:])
    mixture = sweep.result("Q5_K_M")
    kld, p999 = (mixture.evaluation.metrics[f"fidelity/{name}_nats"].value for name in ("mean_kld", "kld_p999"))
    alone = [f"Q5_K_M, {mixture.bytes:,}", "–", f"{kld:.5f}", f"{p999:.4f}", "–", "–", "no plan of its size"]
    assert large == alone
    assert small[1].startswith("budget-size-of-Q4_K_M, ") and small[-1] == "**wins**"


def test_a_plan_whose_size_no_mixture_has_has_a_row_against_the_largest_that_is_no_larger(tmp_path):
    sweep = make_sweep(tmp_path, budgets=("size-of:Q5_K_M", "5.8bpw", "5bpw"))
    words, _, heads, _, *rows = section(report(sweep, comparisons=sweep.comparisons), SAME_BYTES)
    assert "part of the change is theirs" in words
    rows = {row["candidate, bytes"]: row for row in (dict(zip(cells(heads), cells(row), strict=True)) for row in rows)}
    between, smallest = sweep.result("budget-5.8bpw"), sweep.result("budget-5bpw")
    stock = sweep.result("Q4_K_M")
    assert between.bytes > stock.bytes > smallest.bytes
    for plan in (between, smallest):  # all mixtures are larger than the smallest plan: it meets the smallest of them
        row = rows[f"{plan.name}, {plan.bytes:,} ({100 * (plan.bytes / stock.bytes - 1):+.1f} %)"]
        (found,) = (one for one in sweep.comparisons if (one.candidate, one.rival) == (plan.name, "Q4_K_M"))
        assert row["mixture, bytes"] == f"Q4_K_M, {stock.bytes:,}"
        assert row["mean KLD (nats)"] == f"{stock.kld.value:.5f} → {plan.kld.value:.5f}"
        assert row["change of mean KLD"] == found.in_words.replace(" mean KLD", "")
        assert row["verdict"] == {"win": "**wins**", "tie": "no difference", "loss": "loses"}[found.verdict]
    assert rows["–"]["mixture, bytes"].startswith("Q4_K_M") and rows["–"]["verdict"] == "no plan of its size"
    assert len(rows) == 4


def test_without_a_measured_mixture_the_report_says_that_plans_by_budget_are_held_against_nothing(sweep):
    results = [result for result in sweep.results if result.plan.policy not in ("stock", "threshold")]
    rule = SelectionRule(reference=None)
    text = report(sweep, choose(results, rule), results, rule=rule)
    said = "No plan by budget is eligible, as no stock mixture was measured that it could be held against."
    assert text.split("\n\n")[1] == (
        f"Nothing was chosen: there are no eligible quantized candidates whose mean KLD was measured. {said}"
    )
    rows = [cells(row) for row in section(text, SAME_BYTES)[4:]]
    plans = [result for result in sweep.results if result.plan.policy == "budget"]
    assert [row[:2] for row in rows] == [["–", f"{plan.name}, {plan.bytes:,}"] for plan in plans[::-1]]
    assert {row[-1] for row in rows} == {"no mixture to hold it against"}
    assert said not in report(sweep) and said not in verdict(sweep.results, None, rule)


def test_without_plans_of_a_mixtures_size_there_is_no_such_section(sweep):
    results = [result for result in sweep.results if result.plan.policy != "budget"]
    assert SAME_BYTES not in report(sweep, results=results)


def test_predicted_stands_beside_measured_where_it_is_known(sweep):
    results = [dataclasses.replace(sweep.result("Q4_K_M"), predicted=None), sweep.result("threshold-0.2")]
    rows = [cells(row) for row in report(sweep, results=results).splitlines() if row.startswith("|")]
    place = rows[0].index(PREDICTED)
    assert rows[0][place - 1] == "mean KLD (nats)"
    predicted = results[1].predicted
    assert [row[place] for row in rows[2:4]] == [f"{predicted.value:.5f} ± {predicted.stderr:.5f}", "–"]
    unknown = [dataclasses.replace(result, predicted=None) for result in results]
    assert PREDICTED not in report(sweep, results=unknown)


def test_checks_of_predictions_are_in_the_report(sweep):
    text = report(sweep, checks=[sweep.check("budget-size-of-Q4_K_M")])
    assert "**budget-size-of-Q4_K_M**: on other samples" in "".join(section(text, "Predicted against measured"))


def test_a_cell_cannot_break_the_markdown_table(sweep):
    named = dataclasses.replace(sweep.results[1], plan=sweep.results[1].plan.model_copy(update={"name": "a|b\nc"}))
    assert "| a\\|b c |" in report(sweep, results=[sweep.results[0], named])


def test_nothing_chosen_is_said(sweep):
    text = verdict(sweep.results, None, SelectionRule(max_bytes=1))
    assert text.startswith("Nothing was chosen: there are no eligible quantized candidates no larger than")


def test_the_reference_is_not_compared_with_itself(sweep):
    assert "Against" not in verdict(sweep.results, sweep.result("Q4_K_M"), RULE)


@pytest.mark.parametrize("best", ["budget-size-of-Q5_K_M", None])
def test_the_terminal_table_fits_120_columns_and_marks_the_best(sweep, best):
    output = io.StringIO()
    console = Console(file=output, width=120)
    console.print(terminal_table(sweep.results, sweep.failures, sweep.result(best) if best else None))
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 120
    assert "…" not in output.getvalue()
    marks = {name: line.split()[0] for line in lines for name in ("size-of-Q5_K_M", "threshold-0.9") if name in line}
    assert marks == {"size-of-Q5_K_M": "★" if best else "◆", "threshold-0.9": "✗"}
    result = sweep.result("threshold-0.2")
    figures = f"{result.predicted.value:.5f}  {result.kld.value:.5f} ± {result.kld.stderr:.5f}"
    assert figures in output.getvalue(), "predicted stands beside measured"


def test_kept_tensors_are_on_the_terminal_where_nothing_was_predicted(sweep):
    output = io.StringIO()
    results = [dataclasses.replace(result, predicted=None) for result in sweep.results]
    Console(file=output, width=120).print(terminal_table(results, [], None))
    assert "predicted" not in output.getvalue()
    (row,) = (line.split() for line in output.getvalue().splitlines() if "threshold-0.2" in line)
    assert row[3] == str(sweep.result("threshold-0.2").plan.parameters["kept_tensors"])


def test_bold_is_the_best_figure_and_nothing_where_all_are_alike(sweep):
    even = Metric(value=0.0, stderr=0.0, n=40)
    results = []
    for result in sweep.results:
        metrics = {**result.evaluation.metrics, "speed/time_to_first_token_ms": even}
        results.append(
            dataclasses.replace(result, evaluation=result.evaluation.model_copy(update={"metrics": metrics}))
        )
    text = report(sweep, results=results)
    lowest = sweep.result("budget-size-of-Q5_K_M").kld
    assert f"| **{lowest.value:.5f} ± {lowest.stderr:.5f}** |" in text
    heads, _, *rows = [cells(line) for line in text.splitlines() if line.startswith("|")]
    place = heads.index("first token (ms)")
    assert {row[place] for row in rows[: len(results)]} == {"0 ± 0"}


def test_a_wilson_interval_is_shown_rather_than_a_standard_error(sweep):
    column = next(column for column in COLUMNS if column.metric == "json/valid_percent")
    metrics = {name: Metric(value=value) for name, value in zip(column.interval, (0.0, 8.8), strict=True)}
    metrics["json/valid_percent"] = Metric(value=0.0, stderr=0.0, n=40)
    evaluation = sweep.results[0].evaluation.model_copy(update={"metrics": metrics})
    assert column.show(evaluation, spread=True) == "0.0 (0.0 to 8.8)"


def test_every_column_shows_a_metric_once():
    assert len({column.metric for column in COLUMNS}) == len({column.heading for column in COLUMNS}) == len(COLUMNS)
    assert COLUMNS[0].metric == KLD
