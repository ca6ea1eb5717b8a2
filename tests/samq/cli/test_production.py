"""`samq rollback` and `samq status` on an empty registry; tests/flows and tests/end_to_end have the rest."""

from tests.command_line import refused


def test_rollback_and_status_show_that_they_query_mlflow(samq, shown, mlflow_uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    for command, what in {
        ("status",): "query MLflow",
        ("rollback", "nothing", "--reason", "x"): "roll back nothing",
    }.items():
        bars = shown(*command)
        assert "load Python packages" in bars and what in bars
    assert refused(samq("status", "nothing"), "has no model nothing; register one first")
