"""What watches a server: the rules by promtool, and every metric that is asked for among those that a server has."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from samq.errors import SamqError

MONITORING = Path(__file__).parent.parent / "deployments" / "monitoring"
DASHBOARD = json.loads((MONITORING / "grafana" / "samq.json").read_text())
RULES = [
    rule for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
SELECTOR = re.compile(r"\b(up\b|(?:samq_|llamacpp:|process_)\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*[=!][=~]?\s*"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
SHOWN = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")
PROMETHEUS = {"job", "instance"}  # labels that Prometheus gives to what it scrapes
ELSEWHERE = {"up": set(), "samq_process_gpu_memory_bytes": set()}  # Prometheus' own, and where there is a GPU


def queries():
    """(where, PromQL, texts that show its labels) of every alert and everything the dashboard asks."""
    found = [(rule["alert"], rule["expr"], " ".join(rule["annotations"].values())) for rule in RULES]
    found += [
        (panel["title"], target["expr"], target["legendFormat"])
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
    ]
    found += [(one["name"], one["expr"], one["titleFormat"]) for one in DASHBOARD["annotations"]["list"]]
    return found


def missing(query, text, exported):
    """What a query or the text beside it asks for and is not there: `metric`, `metric{label}`, `{{label}}`."""
    exported = {name: labels | PROMETHEUS for name, labels in (ELSEWHERE | exported).items()}
    asked = SELECTOR.findall(query)
    grouped = {label for group in GROUPING.findall(query) for label in re.findall(r"\w+", group)}
    found = {name for name, _ in asked if name not in exported}
    shown = set() if re.search(r"\b(?:sum|max|min)\b", query) else set(PROMETHEUS)
    for name, matchers in asked:
        wanted = {*MATCHER.findall(matchers)} | grouped
        found |= {f"{name}{{{label}}}" for label in wanted if name in exported and label not in exported[name]}
    return found | {f"{{{{{label}}}}}" for label in {*SHOWN.findall(text)} - grouped - shown}


def promtool(*arguments):
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("NOT TESTED: alert rules and queries, as promtool is missing (Debian: the package prometheus)")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def exported():
    """Sample -> its labels, at /metrics of a server that has refused a request, and then got a model."""
    app = pytest.importorskip("samq.serving.app", reason="there is no server yet")
    from samq.serving.settings import ServingSettings
    from samq.serving.source import ServedGguf

    def nothing_yet():
        raise SamqError("nothing is in production yet")

    server = app.Server(nothing_yet, ServingSettings())
    with TestClient(app.create_app(server)) as client:
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 503
        server.metrics.show_model(ServedGguf(name="llama", path=Path("llama.gguf"), sha256="0" * 64))
        text = client.get("/metrics").text
    return {
        sample.name: set(sample.labels) for family in text_string_to_metric_families(text) for sample in family.samples
    }


@pytest.mark.parametrize(("where", "query", "text"), queries(), ids=[where for where, _, _ in queries()])
def test_every_metric_and_label_that_is_asked_for_is_at_metrics_of_a_server(where, query, text, exported):
    assert SELECTOR.search(query), query
    assert missing(query, text, exported) == set()


def test_the_table_of_models_names_labels_that_are_there(exported):
    (table,) = [panel for panel in DASHBOARD["panels"] if panel["type"] == "table"]
    (change,) = table["transformations"]
    assert change["options"]["indexByName"].keys() == exported["samq_model_info"] | {"instance"}


@pytest.mark.parametrize(
    ("query", "text", "what"),
    [
        ("samq_request_total", "", "samq_request_total"),
        ('rate(samq_requests_total{code=~"5.."}[5m])', "", "samq_requests_total{code}"),
        ("sum by (instance, code) (rate(samq_requests_total[5m]))", "", "samq_requests_total{code}"),
        ("sum by (le) (llamacpp:kv_cache_usage_ratio)", "", "llamacpp:kv_cache_usage_ratio{le}"),
        ("up unless on (host) samq_model_info", "", "up{host}"),
        ("sum by (status) (rate(samq_requests_total[5m]))", "{{code}}", "{{code}}"),
        ("max(samq_model_reload_failed)", "{{ $labels.instance }} failed", "{{instance}}"),
    ],
)
def test_a_metric_or_label_that_has_another_name_is_found(query, text, what, exported):
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
    asked = [(one["alertname"], bool(one["exp_alerts"])) for test in tests for one in test["alert_rule_test"]]
    assert set(asked) == {(rule["alert"], fires) for rule in RULES for fires in (True, False)}


@pytest.mark.parametrize(
    ("limit", "other"),
    [
        ("> 0.01", "> 0.03"),
        ("> 0.1\n", "> 0.2\n"),
        ("> 0.9\n", "> 0.96\n"),
        ("> 0.9\n", "> 0.85\n"),
        ("max_over_time(llamacpp:kv_cache_usage_ratio[5m])", "llamacpp:kv_cache_usage_ratio"),
        ("kv_cache_usage_ratio[5m]) > 0.9\n        for: 10m", "kv_cache_usage_ratio[5m]) > 0.9\n        for: 5m"),
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
    asked = [*DASHBOARD["panels"], *DASHBOARD["annotations"]["list"], *DASHBOARD["templating"]["list"]]
    asked += [target for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert {one["datasource"]["uid"] for one in asked} == {source["uid"]}
    assert {one["datasource"]["type"] for one in asked} == {source["type"]}
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
