"""What plans are made for: the full-precision GGUF, and the importance matrix that it is quantized with."""

from dataclasses import dataclass

from samq.allocation.target import OpenTarget
from samq.files import GGUF_NAME, IMATRIX_NAME
from samq.records import Toolchain
from samq.store import Artifact


@dataclass(frozen=True)
class Target:
    """The artifacts of `convert` and `imatrix`."""

    full: Artifact
    imatrix: Artifact | None

    def open(self, toolchain: Toolchain) -> OpenTarget:
        """Read the GGUF's tensors, and ask llama-quantize which of them it quantizes."""
        imatrix = self.imatrix.file(IMATRIX_NAME) if self.imatrix else None
        return OpenTarget.open(self.full.file(GGUF_NAME), toolchain, imatrix)
