"""What watches a server: the rules by promtool, and every metric that is asked for among those that a server has."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from samq.serving.source import FileSource
from tests.samq.serving.conftest import Occupied, put, running, serves
from tests.samq.serving.tiny_chat import write_chat_gguf

MONITORING = Path(__file__).parent.parent / "deployments" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana" / "samq.json").read_text())
RULES = [
    rule for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
SELECTOR = re.compile(r"\b(up\b|(?:samq_|llamacpp:|process_)\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*([=!][=~]?)\s*"([^"]*)"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
SHOWN = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")
PROMETHEUS = {"job", "instance"}  # labels that Prometheus gives to what it scrapes
ELSEWHERE = {"up": [{}], "samq_process_gpu_memory_bytes": [{}]}  # Prometheus' own, and where there is a GPU


def queries():
    """(where, PromQL, texts that show its labels) of every alert and everything the dashboard asks."""
    all_queries = [(rule["alert"], rule["expr"], " ".join(rule["annotations"].values())) for rule in RULES]
    all_queries += [
        (panel["title"], target["expr"], target["legendFormat"])
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
    ]
    all_queries += [(one["name"], one["expr"], one["titleFormat"]) for one in DASHBOARD["annotations"]["list"]]
    return all_queries


def missing(query, text, exported):
    """What a query or the text beside it asks for and is not there: `name`, `name{label}`, `name{label="value"}`, `{{label}}`."""
    exported = ELSEWHERE | exported
    selectors = SELECTOR.findall(query)
    grouped = {label for group in GROUPING.findall(query) for label in re.findall(r"\w+", group)}
    shown = set() if re.search(r"\b(?:sum|max|min)\b", query) else PROMETHEUS
    absent = {f"{{{{{label}}}}}" for label in {*SHOWN.findall(text)} - grouped - shown}
    for name, braces in selectors:
        series = exported.get(name)
        if series is None:
            absent.add(name)
            continue
        matchers = MATCHER.findall(braces)
        known = PROMETHEUS.union(*series)
        absent |= {
            f"{name}{{{label}}}" for label in {label for label, _, _ in matchers} | grouped if label not in known
        }
        own = [matcher for matcher in matchers if matcher[0] in known - PROMETHEUS]
        if not any(all(matches(labels, *matcher) for matcher in own) for labels in series):
            absent.add(f"{name}{{{braces}}}")
    return absent


def matches(labels, label, operator, value):
    """Whether a series is one that a matcher asks for."""
    actual = labels.get(label, "")
    return (re.fullmatch(value, actual) is not None if "~" in operator else actual == value) != ("!" in operator)


def promtool(*arguments):
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("NOT TESTED: alert rules and queries, as promtool is missing (Debian: the package prometheus)")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Sample -> the labels of each of its series, at /metrics of a server that was asked without a model, with one, and
    while it was busy.
    """
    gguf = write_chat_gguf(tmp_path_factory.mktemp("chat") / "tiny.gguf")
    file = tmp_path_factory.mktemp("served") / "tiny.gguf"
    with running(FileSource(file), wait=False, queue_size=0, slots=1) as server:
        assert server.complete().status_code == 503
        put(gguf, file)
        server.wait(serves(server, gguf))
        assert server.complete().status_code == 200
        with Occupied(server):
            assert server.complete().status_code == 429
        for status in ("503", "200", "429"):  # counted when the last byte is on its way
            labels = {"endpoint": "/v1/completions", "status": status}
            server.wait(lambda labels=labels: server.metric("samq_requests_total", **labels) >= 1)
        text = server.client.get("/metrics").text
    series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            series.setdefault(sample.name, []).append(sample.labels)
    return series


@pytest.mark.parametrize(("where", "query", "text"), queries(), ids=[where for where, _, _ in queries()])
def test_every_series_and_label_that_is_asked_for_is_at_metrics_of_a_server(where, query, text, exported):
    assert SELECTOR.search(query), query
    assert missing(query, text, exported) == set()


def test_the_table_of_models_names_labels_that_are_there(exported):
    (table,) = [panel for panel in DASHBOARD["panels"] if panel["type"] == "table"]
    (change,) = table["transformations"]
    assert change["options"]["indexByName"].keys() == exported["samq_model_info"][0].keys() | {"instance"}


@pytest.mark.parametrize(
    ("query", "text", "what"),
    [
        ("samq_request_total", "", "samq_request_total"),
        ('rate(samq_requests_total{code=~"5.."}[5m])', "", "samq_requests_total{code}"),
        ('rate(samq_requests_total{status="5xx"}[5m])', "", 'samq_requests_total{status="5xx"}'),
        ('samq_requests_total{endpoint!~"/.*"}', "", 'samq_requests_total{endpoint!~"/.*"}'),
        ("sum by (instance, code) (rate(samq_requests_total[5m]))", "", "samq_requests_total{code}"),
        ("sum by (le) (llamacpp:requests_processing)", "", "llamacpp:requests_processing{le}"),
        ("up unless on (host) samq_model_info", "", "up{host}"),
        ("sum by (status) (rate(samq_requests_total[5m]))", "{{code}}", "{{code}}"),
        ("max(samq_model_reload_failed)", "{{ $labels.instance }} failed", "{{instance}}"),
    ],
)
def test_a_metric_label_or_value_that_has_another_name_is_found(query, text, what, exported):
    assert what in missing(query, text, exported)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_says_what_is_the_matter_and_what_to_do(rule):
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "action"}


def test_the_alerts_fire_when_they_should_and_are_quiet_just_short_of_it():
    done = promtool("test", "rules", str(MONITORING / "alerts_test.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_to_fire_and_to_stay_quiet():
    tests = yaml.safe_load((MONITORING / "alerts_test.yaml").read_text())["tests"]
    expectations = [(one["alertname"], bool(one["exp_alerts"])) for test in tests for one in test["alert_rule_test"]]
    assert set(expectations) == {(rule["alert"], fires) for rule in RULES for fires in (True, False)}


@pytest.mark.parametrize(
    ("limit", "other"),
    [
        ("> 0.01", "> 0.03"),
        ("> 0.1\n", "> 0.2\n"),
        ("restarts_total[15m])) > 0\n", "restarts_total[15m])) > 2\n"),
        ("restarts_total[15m])", "restarts_total[1h])"),
        ("== 0\n", "== 2\n"),
        (">= 3\n", ">= 2\n"),
        (">= 3\n", ">= 5\n"),
        ("> 5\n", "> 4\n"),
        ("> 5\n", "> 8\n"),
        ("> 0.05\n", "> 0.03\n"),
        ("> 0.05\n", "> 0.07\n"),
    ],
)
def test_the_rules_tests_notice_another_limit(limit, other, tmp_path):
    text = (MONITORING / "alerts.yaml").read_text()
    assert text.count(limit) == 1
    (tmp_path / "alerts.yaml").write_text(text.replace(limit, other))
    shutil.copy(MONITORING / "alerts_test.yaml", tmp_path)
    assert promtool("test", "rules", str(tmp_path / "alerts_test.yaml")).returncode == 1


def test_prometheus_accepts_its_configuration_which_names_the_rules():
    done = promtool("check", "config", str(MONITORING / "prometheus.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 rule files found" in done.stdout


def test_prometheus_accepts_every_query_of_the_dashboard(tmp_path):
    """As rules, since promtool reads no dashboard; Grafana's variables get a value."""
    expressions = [query.replace("$__rate_interval", "1m").replace("$instance", ".*") for _, query, _ in queries()]
    rules = [{"record": f"query:{number}", "expr": text} for number, text in enumerate(expressions)]
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = promtool("check", "rules", str(path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboards_panels_ask_the_provisioned_datasource():
    (source,) = yaml.safe_load((MONITORING / "grafana" / "datasources.yaml").read_text())["datasources"]
    elements = [*DASHBOARD["panels"], *DASHBOARD["annotations"]["list"], *DASHBOARD["templating"]["list"]]
    elements += [target for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert {one["datasource"]["uid"] for one in elements} == {source["uid"]}
    assert {one["datasource"]["type"] for one in elements} == {source["type"]}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_dashboards_panels_lie_beside_one_another():
    cells = [
        (panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy)
        for panel in DASHBOARD["panels"]
        for dx in range(panel["gridPos"]["w"])
        for dy in range(panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24, "Grafana's grid has 24 columns"
