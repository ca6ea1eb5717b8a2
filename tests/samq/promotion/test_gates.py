import dataclasses
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from samq.allocation.target import OpenTarget
from samq.errors import SamqError
from samq.promotion.evidence import Evidence, Measured, Reference
from samq.promotion.gates import failed, judge
from samq.promotion.policy import AccuracyPolicy, JsonPolicy, load_policy
from samq.sweep.benchmarking import join_items
from samq.tracking.registry import RegisteredGguf
from tests.conftest import write_tiny_gguf
from tests.samq.sweeps import make_sweep
from tests.samq.versions import POLICY, answers, benchmark_items, night

POLICIES = sorted((Path(__file__).parents[3] / "deployments" / "promotion").glob("*.yaml"))
FULL, PRODUCTION = "full precision", "production"


@pytest.fixture(scope="module")
def results(tmp_path_factory, toolchain):
    folder = tmp_path_factory.mktemp("gates")
    (folder / "sweep").mkdir()
    sweep = make_sweep(folder / "sweep", layers=1, thresholds=(), stock=("Q4_K_M",), budgets=())
    target = OpenTarget.open(write_tiny_gguf(folder / "tiny.gguf", blocks=1), toolchain)
    return night(sweep, target, folder / "night", "Q4_K_M")


def of(result, name, valid=300, right=300, first=0):
    return Measured(name, result.evaluation, join_items(answers(valid, first), benchmark_items(right)))


@pytest.fixture
def evidence(results):
    """A candidate that answers as full precision and production do."""
    full, candidate = results
    return Evidence(
        version=RegisteredGguf(
            name="llama",
            version="2",
            uri=candidate.gguf.as_uri(),
            sha256=candidate.model.sha256,
            size_bytes=candidate.bytes,
            plan_digest=candidate.plan.digest(),
            run_id="run",
        ),
        tags=dict.fromkeys(("candidate", "gguf_uri", "sha256", "size_bytes", "plan_digest", "parent_run"), "given"),
        plan=candidate.plan,
        candidate=of(candidate, "version 2"),
        references=(
            Reference(FULL, FULL, of(full, FULL)),
            Reference(PRODUCTION, "production (version 1)", of(candidate, "production (version 1)")),
        ),
        production="1",
    )


def gate(evidence, name, policy=POLICY):
    (outcome,) = [one for one in judge(evidence, policy) if one.name == name]
    return outcome


def with_candidate(evidence, **changes):
    return dataclasses.replace(evidence, candidate=dataclasses.replace(evidence.candidate, **changes))


def with_version(evidence, **changes):
    return dataclasses.replace(evidence, version=dataclasses.replace(evidence.version, **changes))


def test_a_candidate_that_is_no_worse_passes_every_gate(evidence):
    gates = judge(evidence, POLICY)
    assert [one.name for one in gates] == [
        *("audit", "provenance", "mean KLD", "predicted VRAM", "p99 latency"),
        *("arc/acc against full precision", "arc/acc against production"),
        *("json/valid against full precision", "json/valid against production"),
    ]
    assert {one.verdict for one in gates} == {"pass"}
    assert all(one.value and one.limit and not one.reason for one in gates)


def test_what_the_policy_does_not_ask_for_does_not_apply(evidence):
    nothing = POLICY.model_copy(
        update={**dict.fromkeys(type(POLICY).model_fields), "audit": False},
    )
    assert {(one.verdict, one.reason) for one in judge(evidence, nothing)} == {
        ("not applicable", "the policy does not require it")
    }


def test_before_anything_is_in_production_full_precision_alone_is_the_reference(evidence):
    nothing = Reference(PRODUCTION, PRODUCTION, None, "nothing is in production yet", expected=False)
    first = dataclasses.replace(evidence, references=(evidence.references[0], nothing), production=None)
    outcome = gate(first, "json/valid against production")
    assert (outcome.verdict, outcome.reason) == ("not applicable", "nothing is in production yet")
    assert failed(judge(first, POLICY)) == []


def test_a_reference_of_which_nothing_is_known_any_more_fails(evidence):
    lost = Reference(FULL, FULL, None, "the sweep has no full-precision run; run it again")
    outcome = gate(dataclasses.replace(evidence, references=(lost,)), "json/valid against full precision")
    assert (outcome.verdict, outcome.reason) == ("fail", lost.reason)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sha256": "0" * 64}, "is not the registered file"),
        ({"uri": "file:///nowhere/model.gguf"}, r"cannot read /nowhere/model\.gguf"),
        ({"uri": "s3://bucket/model.gguf"}, "not on this machine"),
        ({"plan_digest": "0" * 64}, "the plan in the version's run is not the registered one"),
    ],
)
def test_a_file_that_is_not_the_registered_one_fails_the_audit(evidence, changes, message):
    outcome = gate(with_version(evidence, **changes), "audit")
    assert outcome.verdict == "fail"
    assert re.search(message, outcome.reason)


def test_a_file_that_is_not_its_plan_fails_the_audit(evidence):
    name = "blk.0.attn_q.weight"
    plan = evidence.plan.model_copy(update={"types": {**evidence.plan.types, name: "Q8_0"}})
    other = dataclasses.replace(with_version(evidence, plan_digest=plan.digest()), plan=plan)
    outcome = gate(other, "audit")
    assert outcome.verdict == "fail"
    assert f"drifted from plan Q4_K_M, {name} first" in outcome.reason


def test_another_file_than_the_measured_one_fails_the_audit(evidence):
    other = evidence.candidate.evaluation.model_copy(update={"sha256": "0" * 64})
    outcome = gate(with_candidate(evidence, evaluation=other), "audit")
    assert outcome.verdict == "fail"
    assert outcome.reason.split(";")[0] == "the evaluation measured another file than the registered one"


def test_missing_provenance_is_named(evidence, results, tmp_path):
    wanted = POLICY.model_copy(update={"provenance": ("plan", "signature")})
    tags = {**evidence.tags, "parent_run": ""}
    outcome = gate(dataclasses.replace(evidence, tags=tags), "provenance", wanted)
    assert (outcome.verdict, outcome.value) == ("fail", "1 keys, 5 tags")
    assert outcome.reason.startswith("missing: samq.signature of the GGUF, tag parent_run of the version;")
    bare = shutil.copy(results[0].gguf, tmp_path / "bare.gguf")
    assert gate(with_version(evidence, uri=bare.as_uri()), "provenance").value == "0 keys, 6 tags"


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("mean KLD", "max_mean_kld_nats"),
        ("predicted VRAM", "max_predicted_vram_bytes"),
        ("p99 latency", "max_latency_p99_ms"),
    ],
)
def test_a_figure_over_its_limit_fails(evidence, name, field):
    strict = POLICY.model_copy(update={field: 1 if field.endswith("bytes") else 0.001})
    assert gate(evidence, name, strict).verdict == "fail"
    assert gate(evidence, name).verdict == "pass"


@pytest.mark.parametrize(
    ("name", "prefix"), [("mean KLD", "fidelity"), ("predicted VRAM", "memory"), ("p99 latency", "speed")]
)
def test_a_figure_that_was_not_measured_fails_with_the_evaluations_reason(evidence, name, prefix):
    evaluation = evidence.candidate.evaluation
    metrics = {key: metric for key, metric in evaluation.metrics.items() if not key.startswith(f"{prefix}/")}
    unmeasured = evaluation.model_copy(update={"metrics": metrics, "missing": {prefix: "no time was left"}})
    outcome = gate(with_candidate(evidence, evaluation=unmeasured), name)
    assert (outcome.verdict, outcome.value, outcome.reason) == ("fail", "", "not measured: no time was left")


@pytest.mark.parametrize(("items", "changes"), [("json/valid", {"valid": 200}), ("arc/acc", {"right": 200})])
def test_worse_answers_than_full_precisions_fail(evidence, results, items, changes):
    outcome = gate(
        dataclasses.replace(evidence, candidate=of(results[1], "version 2", **changes)), f"{items} against {FULL}"
    )
    assert (outcome.verdict, outcome.reason) == ("fail", "worse by more than the margin, at 95 % confidence")
    assert outcome.value.startswith("0.500 against 0.750, worse by at most 0.2")
    assert outcome.limit == "worse by less than 0.0375, 5 % of full precision"


def test_a_candidate_as_good_as_full_precision_but_worse_than_production_fails(evidence, results):
    better = of(results[1], "production (version 1)", valid=360)
    references = (evidence.references[0], dataclasses.replace(evidence.references[1], measured=better))
    worse = dataclasses.replace(evidence, references=references)
    assert [one.name for one in failed(judge(worse, POLICY))] == ["json/valid against production"]


def test_too_few_items_to_tell_fail_and_say_how_many_it_takes(evidence):
    strict = POLICY.model_copy(update={"json_answers": JsonPolicy(margin=0.001)})
    outcome = gate(evidence, "json/valid against full precision", strict)
    assert outcome.verdict == "fail"
    assert re.fullmatch(r"400 items are too few to decide; about [\d,]+ would be enough", outcome.reason)


def test_a_single_item_shows_nothing(evidence):
    one = evidence.candidate.items.groupby(["benchmark", "metric"]).head(1)
    (full, _) = evidence.references
    alone = dataclasses.replace(full, measured=dataclasses.replace(full.measured, items=one))
    single = dataclasses.replace(with_candidate(evidence, items=one), references=(alone,))
    outcome = gate(single, "json/valid against full precision")
    assert (outcome.verdict, outcome.value) == ("fail", "1.000 against 1.000, worse by at most 0.730")


def test_an_improvement_is_told_as_such(evidence, results):
    better = dataclasses.replace(evidence, candidate=of(results[1], "version 2", valid=390))
    outcome = gate(better, "json/valid against full precision")
    assert outcome.verdict == "pass"
    assert outcome.value.startswith("0.975 against 0.750, better by at least 0.1")


def test_other_items_cannot_be_compared(evidence, results):
    others = dataclasses.replace(evidence, candidate=of(results[1], "version 2", first=1))
    outcome = gate(others, "json/valid against full precision")
    assert outcome.verdict == "fail"
    assert "were not asked the same items of json; evaluate both" in outcome.reason


def test_a_benchmark_that_was_not_run_fails_with_the_evaluations_reason(evidence):
    wanted = POLICY.model_copy(update={"accuracy": AccuracyPolicy(benchmarks=("mmlu/acc",))})
    evaluation = evidence.candidate.evaluation.model_copy(update={"missing": {"eval/mmlu": "there is no network"}})
    outcome = gate(with_candidate(evidence, evaluation=evaluation), "mmlu/acc against full precision", wanted)
    assert (outcome.verdict, outcome.reason) == ("fail", "version 2 was not measured: there is no network")


def test_a_candidate_without_any_table_of_items_fails(evidence):
    outcome = gate(with_candidate(evidence, items=join_items(None, None)), "json/valid against production")
    assert outcome.reason == "version 2 was not measured: the evaluation gives no reason; run the sweep again"


def test_tables_of_items_are_read_whatever_else_they_hold():
    both = join_items(answers(1), benchmark_items(1))
    assert set(both["benchmark"] + "/" + both["metric"]) == {"json/valid", "arc/acc"}
    assert len(join_items(answers(1), None)) == len(answers(1))
    assert isinstance(join_items(None, None), pd.DataFrame)


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_every_policy_file_is_read(path):
    assert load_policy(path).audit


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("audit: true", "audits: true", "audit: Field required"),
        ("audit: true", "audit: true\nmax_kld: 1", "max_kld: Extra inputs are not permitted"),
        ("max_mean_kld_nats: 0.05", "max_mean_kld_nats: -1", "max_mean_kld_nats: Input should be greater than 0"),
        ("    - mmlu/acc ", "    - mmlu ", "accuracy.benchmarks.1: String should match pattern"),
        ("  margin: 0.01", "  margin: 2", "accuracy.margin: Input should be less than 1"),
    ],
)
def test_a_policy_that_is_not_one_names_the_field_at_fault(tmp_path, old, new, message):
    (original,) = [path for path in POLICIES if path.stem == "policy"]
    text = original.read_text()
    assert text.count(old) == 1
    (tmp_path / "policy.yaml").write_text(text.replace(old, new))
    with pytest.raises(SamqError, match=re.escape(message)):
        load_policy(tmp_path / "policy.yaml")
