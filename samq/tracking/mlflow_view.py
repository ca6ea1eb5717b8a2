"""The saved view of MLflow's run page that shows a sweep: its candidates, the columns that matter, and charts.

By default MLflow's run table shows no metrics. Its page saves a view when a user chooses *Save as new view*: an
experiment's tag with the state of the page in compressed JSON. This module writes the same tag. It is written for MLflow
3.17; a version that reads views in another way shows its default page instead.
"""

import base64
import json
import zlib
from collections.abc import Iterable
from typing import Any

NAME = "Latest sweep"
KEY = "samq-latest-sweep"
TAG = f"mlflow.sharedViewState.{KEY}"

# Column -> width in pixels, in the order of the table; columns that no candidate has are left out.
_COLUMNS = {
    "metrics.`plan/budget_bytes`": 140,
    "metrics.`plan/threshold`": 110,
    "metrics.`plan/kept_tensors`": 135,
    "metrics.`plan/bits_per_weight`": 150,
    "metrics.`memory/file_bytes`": 140,
    "metrics.`fidelity/mean_kld_nats`": 165,
    "metrics.`plan/predicted_kl_nats`": 175,
    "metrics.`comparison/kld_reduction_percent`": 240,
    "metrics.`json/valid_percent`": 140,
    "metrics.`speed/latency_p99_ms`": 155,
    "metrics.`fidelity/mean_kld_nats_stderr`": 205,
    "metrics.`speed/generation_tokens_per_s`": 210,
    "metrics.`memory/predicted_vram_bytes`": 205,
    "metrics.`fidelity/perplexity_ratio`": 165,
    "metrics.`fidelity/same_top_percent`": 175,
    "tags.`samq.rival`": 110,
    "tags.`samq.verdict`": 130,
}
# Axes of the parallel coordinates. MLflow leaves out a run that lacks an axis, so a chart uses the axes that all have.
_THRESHOLD = "plan/threshold"
_AXES = (
    "memory/file_bytes",
    "plan/predicted_kl_nats",
    "fidelity/mean_kld_nats",
    "json/valid_percent",
    "speed/latency_p99_ms",
)


def view_of(parent_run_id: str, created_ms: int, candidates: Iterable[Iterable[str]]) -> str:
    """The tag's value for a view of one sweep's candidates, the largest first; `candidates` are their metrics' names."""
    metrics = [set(names) for names in candidates]
    common = set.intersection(*metrics) if metrics else set()
    logged = {f"metrics.`{name}`" for names in metrics for name in names}
    columns = {name: width for name, width in _COLUMNS.items() if name in logged or not name.startswith("metrics.")}
    charts = [_parallel("Metrics by size", _AXES, metrics)]
    if with_threshold := [names for names in metrics if _THRESHOLD in names]:
        charts.append(_parallel("Metrics by threshold", (_THRESHOLD, *_AXES), with_threshold))
    charts += [
        _scatter("Size against fidelity", "memory/file_bytes", "fidelity/mean_kld_nats"),
    ]
    if "plan/predicted_kl_nats" in common:
        charts.append(_scatter("Predicted against measured", "plan/predicted_kl_nats", "fidelity/mean_kld_nats"))
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent_run_id}'",
        "orderByKey": "metrics.`memory/file_bytes`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(columns),
        "columnOrder": list(columns),
        "columnWidths": columns,
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,  # otherwise MLflow's own sections of charts come first
        "compareRunCharts": charts,
        "compareRunSections": [{"uuid": "sweep", "name": "Sweep", "display": True, "isReordered": False}],
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    view = {"name": NAME, "createdAt": created_ms, "updatedAt": created_ms, "state": f"deflate;{packed}"}
    return json.dumps(view)


def _parallel(title: str, axes: Iterable[str], candidates: list[set[str]]) -> dict[str, Any]:
    common = [axis for axis in axes if all(axis in names for names in candidates)]
    return _chart("PARALLEL", title, selectedParams=[], selectedMetrics=common, showAllRuns=True)


def _scatter(title: str, x: str, y: str) -> dict[str, Any]:
    return _chart("SCATTER", title, xaxis={"key": x, "type": "METRIC"}, yaxis={"key": y, "type": "METRIC"})


def _chart(kind: str, title: str, **settings: Any) -> dict[str, Any]:
    uuid = title.lower().replace(" ", "-")
    common = {"type": kind, "uuid": uuid, "metricSectionId": "sweep", "deleted": False, "isGenerated": False}
    return {**common, "displayName": title, "runsCountToCompare": 100, **settings}
