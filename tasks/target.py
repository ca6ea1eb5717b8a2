"""What plans are made for: the full-precision GGUF, and the importance matrix that it is quantized with."""

from dataclasses import dataclass

from samq.allocation import target
from samq.files import GGUF_NAME, IMATRIX_NAME
from samq.records import Toolchain
from samq.store import Artifact


@dataclass(frozen=True)
class Target:
    """The artifacts of `convert` and `imatrix`."""

    full: Artifact
    imatrix: Artifact | None

    def open(self, toolchain: Toolchain) -> target.Target:
        """Read the GGUF's tensors, and ask llama-quantize which of them it quantizes."""
        matrix = self.imatrix.path(IMATRIX_NAME) if self.imatrix else None
        return target.Target.open(self.full.path(GGUF_NAME), toolchain, matrix, self.full.files[GGUF_NAME].sha256)
