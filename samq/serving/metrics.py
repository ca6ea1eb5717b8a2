"""The metrics for Prometheus.

The engine's own, `llamacpp:...` of llama-server, follow them as they are. Latencies are histograms as in vLLM.
"""

from collections.abc import Iterator
from contextlib import suppress

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from samq.llamacpp import gpu
from samq.serving.source import ServedGguf

# Seconds; close together around 0.1, the limit of the alert on p99.
_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.09, 0.1, 0.11, 0.125, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.09, 0.1, 0.11, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        """All counters start at 0."""
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "samq_requests", "Answers by endpoint and HTTP status (499: the client left)", ["endpoint", "status"],
            registry=registry,
        )  # fmt: skip
        self.by_key = Counter(
            "samq_requests_by_key", "Requests by the name of their API key", ["key"], registry=registry
        )
        self.running = Gauge("samq_requests_running", "Requests at the engine", registry=registry)
        self.waiting = Gauge("samq_requests_waiting", "Requests that wait in the queue", registry=registry)
        self.slots = Gauge("samq_slots", "Requests that the engine answers at the same time", registry=registry)
        self.restarts = Counter(
            "samq_engine_restarts", "Engines that ended while they served, by reason (died, hung)", ["reason"],
            registry=registry,
        )  # fmt: skip
        self.queue_wait = Histogram(
            "samq_request_queue_time_seconds",
            "From a request's first byte to its slot: its body, checks, and the queue",
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self.first_token = Histogram(
            "samq_time_to_first_token_seconds",
            "From a request's first byte to the first token of its stream",
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self.inter_token = Histogram(
            "samq_inter_token_latency_seconds",
            "From one event of a stream to the next, usually a token each",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self.end_to_end = Histogram(
            "samq_e2e_request_latency_seconds",
            "From a request's first byte to the last of its answer",
            buckets=_REQUEST_BUCKETS,
            registry=registry,
        )
        self.reloads = Counter(
            "samq_model_reloads", "Loads of a model, by result (success, failure)", ["result"], registry=registry
        )
        self.lookup_failures = Counter(
            "samq_model_lookup_failures", "Failures to read MLflow's alias, or the file", registry=registry
        )
        self.reload_failed = Gauge(
            "samq_model_reload_failed",
            "1 if the newest version does not serve, or its file is gone or altered",
            registry=registry,
        )
        self.shadow_agreement = Gauge(
            "samq_shadow_agreement_ratio", "Share of equal tokens in the last shadow check", registry=registry
        )
        self._info = Gauge(
            "samq_model_info", "The model that is served", ["name", "version", "alias", "sha256", "plan"],
            registry=registry,
        )  # fmt: skip
        for result in ("success", "failure"):
            self.reloads.labels(result)  # so that a rate exists before the first load
        for reason in ("died", "hung"):
            self.restarts.labels(reason)
        self.engine_pid: int | None = None
        registry.register(_EngineMemory(self))
        ProcessCollector(registry=registry)

    def show_model(self, gguf: ServedGguf | None) -> None:
        """Name the model that serves now; None: no model."""
        self._info.clear()
        if gguf:
            self._info.labels(gguf.name, gguf.version, gguf.alias, gguf.sha256, gguf.plan_digest).set(1)


class _EngineMemory(Collector):
    """Asks the system for the engine's memory, and the driver for its GPU memory, whenever Prometheus reads the metrics.

    In a container whose process ids are not the driver's, the driver does not list the engine. The memory in use on the
    whole GPU would be wrong then, because of other processes. So there is no sample, instead of a wrong 0.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[GaugeMetricFamily]:
        pid = self._metrics.engine_pid
        if pid is None:
            return
        with suppress(psutil.Error):
            memory = psutil.Process(pid).memory_info().rss
            yield GaugeMetricFamily("samq_engine_memory_bytes", "Resident memory of the engine", value=memory)
        if used := gpu.used_bytes(pid):
            yield GaugeMetricFamily("samq_process_gpu_memory_bytes", "GPU memory that the engine holds", value=used)
