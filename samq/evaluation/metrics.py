"""The metrics that people choose by: their names, and how each is shown.

Every module of this package measures some metrics, named `group/what_unit`, and `measure.py` calls it. A metric reaches MLflow
without being listed here. A metric in `COLUMNS` is also in the report and on the terminal, and has words for a gate.
"""

from dataclasses import dataclass

from samq.records import Evaluation

KLD = "fidelity/mean_kld_nats"
VRAM = "memory/predicted_vram_bytes"
MB = 1e6


@dataclass(frozen=True)
class Column:
    """How a metric is shown: its heading with the unit, the format of value x scale, and which way is better."""

    metric: str
    heading: str
    format: str
    scale: float = 1.0
    lower_is_better: bool = True
    interval: tuple[str, str] | None = None  # metrics with the ends of its confidence interval

    def show(self, evaluation: Evaluation, *, spread: bool = False) -> str:
        """The value as text; with `spread` also its interval or standard error; a dash if it was not measured."""
        metric = evaluation.metrics.get(self.metric)
        if metric is None:
            return "–"
        text = format(metric.value * self.scale, self.format)
        if spread and self.interval and all(name in evaluation.metrics for name in self.interval):
            low, high = (format(evaluation.metrics[name].value * self.scale, self.format) for name in self.interval)
            return f"{text} ({low} to {high})"
        if spread and metric.stderr is not None:
            return f"{text} ± {format(metric.stderr * self.scale, self.format)}"
        return text


KLD_COLUMN = Column(KLD, "mean KLD (nats)", ".5f")
SPEED_COLUMN = Column("speed/generation_tokens_per_s", "speed (tok/s)", ".1f", lower_is_better=False)
COLUMNS = (
    KLD_COLUMN,
    Column("fidelity/kld_p99_nats", "99 % KLD (nats)", ".4f"),
    Column("fidelity/perplexity_ratio", "PPL ratio", ".4f"),
    Column("fidelity/same_top_percent", "same top (%)", ".2f", lower_is_better=False),
    Column(
        "json/valid_percent",
        "JSON valid (%)",
        ".1f",
        lower_is_better=False,
        interval=("json/valid_low_percent", "json/valid_high_percent"),
    ),
    Column("speed/latency_p99_ms", "p99 latency (ms)", ".0f"),
    Column("speed/time_to_first_token_ms", "first token (ms)", ".0f"),
    SPEED_COLUMN,
    Column(VRAM, "VRAM (MB)", ".1f", scale=1 / MB),
)
P999_COLUMN = Column("fidelity/kld_p999_nats", "99.9 % KLD (nats)", ".4f")
