"""A GPU's memory that torch finds full: one sentence instead of a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from samq.errors import SamqError


@contextmanager
def needs_gpu_memory(what: str, advice: str) -> Iterator[None]:
    """Raise SamqError, saying what the memory does not hold and what to do, where torch runs out of GPU memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SamqError(f"the GPU's memory does not hold {what}; {advice}") from error
