"""The saved view of MLflow's run page that shows a sweep: its candidates, the columns that matter, and two charts.

By default MLflow's run table shows no metric at all. Views are what its page itself saves when a person chooses *Save as
new view*: an experiment's tag with the page's state in JSON, compressed. Written for MLflow 3.17; a version that reads
views in another way shows its default page instead.
"""

import base64
import json
import zlib
from typing import Any

NAME = "Latest sweep"
KEY = "samq-latest-sweep"
TAG = f"mlflow.sharedViewState.{KEY}"

# Column -> width in pixels, in the order of the table.
_COLUMNS = {
    "metrics.`plan/threshold`": 110,
    "metrics.`plan/kept_tensors`": 135,
    "metrics.`plan/bits_per_weight`": 150,
    "metrics.`memory/file_bytes`": 140,
    "metrics.`fidelity/mean_kld_nats`": 165,
    "metrics.`json/valid_percent`": 140,
    "metrics.`speed/latency_p99_ms`": 155,
    "metrics.`fidelity/mean_kld_nats_stderr`": 205,
    "metrics.`speed/generation_tokens_per_s`": 210,
    "metrics.`memory/predicted_vram_bytes`": 205,
    "metrics.`fidelity/perplexity_ratio`": 165,
    "metrics.`fidelity/same_top_percent`": 175,
    "tags.`samq.verdict`": 130,
}
_AXES = (
    "plan/threshold",
    "memory/file_bytes",
    "fidelity/mean_kld_nats",
    "json/valid_percent",
    "speed/latency_p99_ms",
)


def view_of(parent_run_id: str, created_ms: int) -> str:
    """The tag's value for a view of one sweep's candidates, the largest first."""
    charts = [
        _chart("PARALLEL", "What a threshold buys", selectedParams=[], selectedMetrics=_AXES, showAllRuns=True),
        _chart(
            "SCATTER",
            "Size against fidelity",
            xaxis={"key": "memory/file_bytes", "type": "METRIC"},
            yaxis={"key": "fidelity/mean_kld_nats", "type": "METRIC"},
        ),
    ]
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{parent_run_id}'",
        "orderByKey": "metrics.`memory/file_bytes`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(_COLUMNS),
        "columnOrder": list(_COLUMNS),
        "columnWidths": _COLUMNS,
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,  # else MLflow's own sections of charts come first
        "compareRunCharts": charts,
        "compareRunSections": [{"uuid": "sweep", "name": "Sweep", "display": True, "isReordered": False}],
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    view = {"name": NAME, "createdAt": created_ms, "updatedAt": created_ms, "state": f"deflate;{packed}"}
    return json.dumps(view)


def _chart(kind: str, title: str, **settings: Any) -> dict[str, Any]:
    common = {"type": kind, "uuid": kind.lower(), "metricSectionId": "sweep", "deleted": False, "isGenerated": False}
    return {**common, "displayName": title, "runsCountToCompare": 100, **settings}
