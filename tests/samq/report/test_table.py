import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from samq.evaluation.metrics import COLUMNS, KLD
from samq.records import Metric
from samq.report.table import PREDICTED, choice_table, markdown_table, results_table, terminal_table
from samq.sweep.selection import Failure, SelectionRule
from tests.samq.sweeps import with_results

BEST = "budget-size-of-Q5_K_M"


@pytest.fixture
def sweep(sweep):
    """The sweep under a rule that lets its larger plans be the best."""
    sweep = replace(sweep, rule=SelectionRule(max_size_ratio=1.6))
    assert sweep.best.name == BEST
    return sweep


def cells(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def rows_of(table):
    """The rows of a Markdown table, the headings first."""
    heads, _, *rows = table.splitlines()
    assert all(line.startswith("|") and line.endswith("|") for line in (heads, *rows))
    return [cells(heads), *map(cells, rows)]


def without(result, metric):
    """A copy of a result in which a metric was not measured."""
    metrics = {name: value for name, value in result.evaluation.metrics.items() if name != metric}
    return replace(result, evaluation=result.evaluation.model_copy(update={"metrics": metrics}))


def printed(table):
    output = io.StringIO()
    Console(file=output, width=120).print(table)
    return output.getvalue()


def test_the_table_has_every_candidate_by_size_with_units_and_errors(sweep):
    table = results_table(sweep).set_index("candidate")
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
    bare = [replace(r, predicted=None) for r in sweep.results if r.plan.policy in ("full", "stock")]
    columns = set(results_table(replace(with_results(sweep, bare), failures=())))
    assert not {"budget", "threshold", PREDICTED, f"± {PREDICTED}"} & columns


def test_what_was_not_measured_is_nan_in_the_table_and_a_dash_for_people(sweep):
    results = [without(sweep.results[0], "json/valid_percent"), *sweep.results[1:]]
    table = results_table(with_results(sweep, results)).set_index("candidate")
    assert math.isnan(table.loc["F16", "JSON valid (%)"])
    json_column = next(column for column in COLUMNS if column.metric == "json/valid_percent")
    assert json_column.show(results[0].evaluation) == "–"
    assert json_column.show(results[1].evaluation, spread=True).count(".") == 3, "value and interval"


def test_a_rung_or_a_check_that_failed_is_no_row(sweep):
    others = (Failure("Q2_K", "ladder", "it hung"), Failure("Q4_K_M", "check", "out of memory"))
    with_others = replace(sweep, failures=(*sweep.failures, *others))
    assert list(results_table(with_others)["candidate"]) == list(results_table(sweep)["candidate"])
    assert terminal_table(with_others).row_count == len(sweep.results) + 1


def test_predicted_stands_beside_measured_where_it_is_known(sweep):
    results = [replace(sweep.result("Q4_K_M"), predicted=None), sweep.result("threshold-0.2")]
    heads, *rows = rows_of(markdown_table(with_results(sweep, results)))
    place = heads.index(PREDICTED)
    assert heads[place - 1] == "mean KLD (nats)"
    predicted = results[1].predicted
    assert [row[place] for row in rows] == [f"{predicted.value:.5f} ± {predicted.stderr:.5f}", "–"]
    unknown = [replace(result, predicted=None) for result in results]
    assert PREDICTED not in markdown_table(with_results(sweep, unknown))


def test_a_cell_cannot_break_the_markdown_table(sweep):
    first, second, *_ = sweep.results
    named = replace(second, plan=second.plan.model_copy(update={"name": "a|b\nc"}))
    sweep = with_results(sweep, [first, named])
    assert "| a\\|b c |" in markdown_table(sweep) and "| a\\|b c |" in choice_table(sweep)


def test_people_choose_by_five_columns(sweep):
    heads, *rows = rows_of(choice_table(sweep))
    assert heads == ["candidate", "size (MB)", "mean KLD (nats)", "change of mean KLD", "speed (tok/s)"]
    assert [row[0] for row in rows] == [
        *("F16", "threshold-0.2", "threshold-0.4", "Q5_K_M", f"**{BEST}** ★", "Q4_K_M", "budget-size-of-Q4_K_M")
    ]
    best, won = sweep.result(BEST), sweep.comparison(BEST, "Q5_K_M")
    speed = best.evaluation.metrics["speed/generation_tokens_per_s"].value
    figures = [f"{best.bytes / 1e6:.1f}", f"{best.kld.value:.5f}"]
    assert rows[4][1:] == [*figures, f"{-100 * won.reduction:+.1f} % against Q5_K_M", f"{speed:.1f}"]
    changes = {row[0]: row[3] for row in rows}
    assert {changes["F16"], changes["Q4_K_M"], changes["Q5_K_M"]} == {"–"}, "nothing is compared with itself"
    assert changes["budget-size-of-Q4_K_M"].endswith(" % against Q4_K_M")


def test_without_a_choice_or_comparisons_no_candidate_is_marked_and_no_change_is_given(sweep):
    _, *rows = rows_of(choice_table(replace(sweep, comparisons=(), rule=SelectionRule(max_bytes=1))))
    assert [row[0] for row in rows] == [result.name for result in sweep.by_size]
    assert {row[3] for row in rows} == {"–"}


@pytest.mark.parametrize("best", [BEST, None])
def test_the_terminal_table_fits_120_columns_and_marks_the_best(sweep, best):
    output = printed(terminal_table(sweep if best else replace(sweep, rule=SelectionRule(max_bytes=1))))
    lines = output.splitlines()
    assert max(map(len, lines)) <= 120
    assert "…" not in output
    marks = {name: line.split()[0] for line in lines for name in ("size-of-Q5_K_M", "threshold-0.9") if name in line}
    assert marks == {"size-of-Q5_K_M": "★" if best else "◆", "threshold-0.9": "✗"}
    result = sweep.result("threshold-0.2")
    figures = f"{result.predicted.value:.5f}  {result.kld.value:.5f} ± {result.kld.stderr:.5f}"
    assert figures in output, "predicted stands beside measured"


def test_kept_tensors_are_on_the_terminal_where_nothing_was_predicted(sweep):
    output = printed(terminal_table(with_results(sweep, (replace(r, predicted=None) for r in sweep.results))))
    assert "predicted" not in output
    (row,) = (line.split() for line in output.splitlines() if "threshold-0.2" in line)
    assert row[3] == str(sweep.result("threshold-0.2").plan.parameters["kept_tensors"])


def test_bold_is_the_best_figure_and_nothing_where_all_are_alike(sweep):
    even = Metric(value=0.0, stderr=0.0, n=40)
    results = []
    for result in sweep.results:
        metrics = {**result.evaluation.metrics, "speed/time_to_first_token_ms": even}
        results.append(replace(result, evaluation=result.evaluation.model_copy(update={"metrics": metrics})))
    text = markdown_table(with_results(sweep, results))
    lowest = sweep.result(BEST).kld
    assert f"| **{lowest.value:.5f} ± {lowest.stderr:.5f}** |" in text
    heads, *rows = rows_of(text)
    place = heads.index("first token (ms)")
    assert {row[place] for row in rows} == {"0 ± 0"}


def test_a_wilson_interval_is_shown_rather_than_a_standard_error(sweep):
    column = next(column for column in COLUMNS if column.metric == "json/valid_percent")
    metrics = {name: Metric(value=value) for name, value in zip(column.interval, (0.0, 8.8), strict=True)}
    metrics["json/valid_percent"] = Metric(value=0.0, stderr=0.0, n=40)
    evaluation = sweep.results[0].evaluation.model_copy(update={"metrics": metrics})
    assert column.show(evaluation, spread=True) == "0.0 (0.0 to 8.8)"


def test_every_column_shows_a_metric_once():
    assert len({column.metric for column in COLUMNS}) == len({column.heading for column in COLUMNS}) == len(COLUMNS)
    assert COLUMNS[0].metric == KLD
