"""What every GGUF says of itself, beside its plan: the `samq.*` metadata."""

from samq import __version__
from samq.sensitivity.fisher import Routing
from samq.sweep.sweep import MadeFrom

_LONGEST_VALUE = 120  # bytes that llama-quantize takes of a metadata override


def provenance(made_from: MadeFrom) -> dict[str, str]:
    """Key (without `samq.`) -> value."""
    toolchain = made_from.toolchain
    return {
        "version": __version__,
        "model": made_from.source.name.encode()[-_LONGEST_VALUE:].decode(errors="ignore"),
        "model_sha256": made_from.source.weights_digest,
        "calibration": made_from.calibration.tokens_digest,
        "llama_cpp": f"{toolchain.version} {toolchain.build}",
    }


def unreached_experts(routing: Routing) -> dict[str, str]:
    """`unreached_experts`: how many experts saw no calibration token; nothing if all saw one, or there are none."""
    return {"unreached_experts": f"{routing.missed} of {routing.experts}"} if routing.missed else {}
