"""What every GGUF says of itself, beside its plan: the `samq.*` metadata."""

from samq import __version__
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
