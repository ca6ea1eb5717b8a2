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
METRIC = re.compile(r"\b(?:samq_|llamacpp:|process_)\w+")
PROMETHEUS = {"up"}  # what Prometheus itself knows of a target
NEEDS_A_GPU = {"samq_process_gpu_memory_bytes"}


def queries():
    """(where, PromQL) of every alert and everything the dashboard asks."""
    found = [(rule["alert"], rule["expr"]) for rule in RULES]
    found += [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
    found += [(one["name"], one["expr"]) for one in DASHBOARD["annotations"]["list"]]
    return found


def promtool(*arguments):
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed (Debian: the package prometheus)")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def exported():
    """Names of the samples at /metrics of a server that has refused a request, and then got a model."""
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
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


@pytest.mark.parametrize(("where", "query"), queries(), ids=[where for where, _ in queries()])
def test_every_metric_that_is_asked_for_is_at_metrics_of_a_server(where, query, exported):
    asked = set(METRIC.findall(query))
    assert asked or set(re.findall(r"\w+", query)) & PROMETHEUS, query
    assert asked <= exported | NEEDS_A_GPU


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
        ("== 0\n", "== 2\n"),
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
    expressions = [query.replace("$__rate_interval", "1m").replace("$instance", ".*") for _, query in queries()]
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
