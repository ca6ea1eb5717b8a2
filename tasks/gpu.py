"""Turns on the GPU among all runs of a Prefect server: its global concurrency limit `gpu`, which `samq up` makes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec

from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.settings import PREFECT_API_URL

from samq.errors import SamqError
from samq.llamacpp import gpu
from samq.services import GPU_LIMIT
from samq.workspace import Workspace

P = ParamSpec("P")
Make = Callable[Concatenate[Workspace, Path, P], None]


def torch_has_gpu(at: Workspace) -> bool:
    """Whether torch computes on a GPU."""
    return at.compute_device != "cpu"


def llama_cpp_has_gpu(_: Workspace) -> bool:
    """Whether llama.cpp may put layers on a GPU."""
    return bool(gpu.names())


def in_turn(uses_gpu: Callable[[Workspace], bool]) -> Callable[[Make[P]], Make[P]]:
    """Decorate what a stage makes, so that it waits for its turn where it uses a GPU."""

    def decorate(make: Make[P]) -> Make[P]:
        @wraps(make)
        def wait_and_make(at: Workspace, folder: Path, /, *args: P.args, **kwargs: P.kwargs) -> None:
            with turn() if uses_gpu(at) else nullcontext():
                make(at, folder, *args, **kwargs)

        return wait_and_make

    return decorate


@contextmanager
def turn() -> Iterator[None]:
    """Wait for a slot of the limit, and hold it for the time of a `with` block; without a server there is nobody to wait for.

    Raises SamqError if the server has no such limit: then nothing would keep two runs apart.
    """
    if not PREFECT_API_URL.value():
        yield
        return
    try:
        # A server that is away for a while does not end a calibration of hours.
        with concurrency(GPU_LIMIT, strict=True, raise_on_lease_renewal_failure=False):
            yield
    except ConcurrencySlotAcquisitionError as error:
        raise SamqError(
            f"Prefect's server has no concurrency limit {GPU_LIMIT}, which keeps two runs from using the GPU at the same time; "
            f"run `prefect gcl create {GPU_LIMIT} --limit 1`, or start the server by `make up`"
        ) from error
