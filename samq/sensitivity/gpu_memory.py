"""One sentence instead of torch's traceback where the GPU's memory does not suffice."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from samq.errors import SamqError


@contextmanager
def needs_gpu_memory(what: str, advice: str) -> Iterator[None]:
    """Raise SamqError if torch runs out of GPU memory: `what` does not fit, and `advice` says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SamqError(f"the GPU's memory does not hold {what}; {advice}") from error
