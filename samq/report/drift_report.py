"""The drift report in Markdown: what differs from the last sweep, and whether chance explains it."""

from collections import Counter

from samq import markdown
from samq.evaluation.metrics import MB
from samq.records import Metric
from samq.sweep.drift import CandidateDrift, Drift
from samq.sweep.selection import percent
from samq.sweep.significance import PairedComparison

_SHOWN_TYPES = 5


def drift_report(drift: Drift) -> str:
    """Inputs, candidates and benchmarks, each only if there is something to say."""
    parts = [f"# Against {drift.last_run}", _inputs(drift)]
    if drift.candidates:
        heads = ["candidate", "size (MB)", "change of size", "mean KLD (nats)", "last mean KLD", "change of mean KLD"]
        heads.append("tensors with another type")
        parts += ["## Candidates", markdown.table(heads, map(_row, drift.candidates))]
        parts.append(
            "A change of mean KLD has its 95 % interval if both sweeps scored the same held-out tokens. The KLD is to full "
            "precision of its own night."
        )
    for what, names in (("New", drift.new), ("Gone", drift.gone)):
        if names:
            parts.append(f"{what}: {', '.join(names)}.")
    rows = [_benchmark(comparison) for candidate in drift.candidates for comparison in candidate.benchmarks]
    if rows:
        heads = ["candidate", "benchmark", "tonight", "last", "difference (95 %)", "p", "items"]
        parts += ["## Benchmarks, item by item", markdown.table(heads, rows)]
    return "\n\n".join(parts) + "\n"


def _inputs(drift: Drift) -> str:
    if not drift.inputs:
        return "The inputs are the same: model, texts, llama.cpp and SAMQ."
    rows = [[name, before or "none", now or "none"] for name, (before, now) in drift.inputs.items()]
    return markdown.table(["input that differs", "last", "tonight"], rows)


def _row(candidate: CandidateDrift) -> list[str]:
    return [
        candidate.name,
        f"{candidate.bytes / MB:.1f}",
        _percent(candidate.bytes / candidate.last_bytes - 1),
        _kld(candidate.kld),
        _kld(candidate.last_kld),
        _change(candidate),
        _types(candidate),
    ]


def _percent(change: float) -> str:
    return percent(change) if change else "none"


def _kld(metric: Metric | None) -> str:
    return f"{metric.value:.5f}" if metric else "not measured"


def _change(candidate: CandidateDrift) -> str:
    """The relative change of mean KLD, with its interval if the tokens are the same."""
    if comparison := candidate.comparison:
        if comparison.low == comparison.high == 0:
            return _percent(0)
        low, high = percent(-comparison.high), percent(-comparison.low)
        return f"{percent(-comparison.reduction)} ({low} to {high})"
    now, last = candidate.kld, candidate.last_kld
    return f"{percent(now.value / last.value - 1)}, other tokens" if now and last and last.value > 0 else ""


def _types(candidate: CandidateDrift) -> str:
    """How many tensors changed, and from what to what."""
    if not candidate.types:
        return "none"
    kinds = Counter(f"{before or 'absent'} to {now or 'absent'}" for before, now in candidate.types.values())
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(_SHOWN_TYPES))
    more = ", ..." if len(kinds) > _SHOWN_TYPES else ""
    return f"{len(candidate.types)} of {candidate.tensors}: {shown}{more}"


def _benchmark(comparison: PairedComparison) -> list[str]:
    low, high = comparison.low, comparison.high
    interval = f" ({low:+.3f} to {high:+.3f})" if low is not None and high is not None else ""
    return [
        comparison.candidate,
        f"{comparison.benchmark} {comparison.metric}",
        f"{comparison.value:.3f}",
        f"{comparison.reference_value:.3f}",
        f"{comparison.difference:+.3f}{interval}",
        f"{comparison.p:.3f}",
        str(comparison.items),
    ]
