"""What all sequences have between the blocks of a model: hidden states, or gradients with respect to them."""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Self

import psutil
import torch

from samq.sensitivity.resume import Checkpoints
from samq.sensitivity.shares import in_turn
from samq.sensitivity.transfer import Transfer, now

COPIERS = 4  # threads that copy states between GPUs and the host, each way
PARTS = 4  # files of the states before a block: one thread does not write as fast as several GPUs compute


class Writer:
    """Changes the files of a folder in the order in which it is asked to, while the computation goes on.

    A disk may be slower than the GPUs. What waits for it stays in memory, up to a quarter of what is free at the start.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._room = psutil.virtual_memory().available // 4
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        """Nothing is written yet."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Nothing changes in the folder after this. After an error, what was asked for is done; else nobody needs it."""
        self._thread.shutdown(cancel_futures=kind is None)

    def submit(self, change: Callable[[], None], size: int = 0) -> "Future[None]":
        """Ask for a change, for which so many bytes stay in memory; raises the error of an earlier one."""
        future = self._thread.submit(self._change, change)
        self._waiting.append((future, size))
        return future

    def is_full(self) -> bool:
        """Whether more waits than there is room for; raises the error of a change."""
        while self._waiting and self._waiting[0][0].done():
            self._waiting.popleft()[0].result()
        return sum(size for _, size in self._waiting) > self._room

    def wait_for_room(self) -> None:
        """Return when no more waits than there is room for, or one set of states; raises the error of a change."""
        while self.is_full() and sum(size > 0 for _, size in self._waiting) > 1:
            self._waiting.popleft()[0].result()

    def _change(self, change: Callable[[], None]) -> None:
        if self._error is not None:  # what follows needs what has failed
            raise self._error
        try:
            change()
        except BaseException as error:
            self._error = error
            raise


class HiddenStates:
    """`put` and `get` the states before a block, of a batch: kept on a device, on the host, or on disk."""

    def __init__(
        self, device: torch.device | None, checkpoints: Checkpoints, writer: Writer, name: str = "states"
    ) -> None:
        """`device` is where they are kept: the host, or the GPUs that give them; None: among the checkpoints by the name."""
        self._name, self._writer = name, writer
        self._checkpoints = checkpoints if device is None else None
        self._device = torch.device("cpu") if device is None else device
        self._kept: dict[int, dict[int, Future[torch.Tensor]]] = {}
        self._bytes: dict[int, int] = defaultdict(int)
        self._local = threading.local()  # a thread's way to the GPUs
        self._leaving, self._coming, self._writing = (
            ThreadPoolExecutor(threads, thread_name_prefix=f"states-{way}")
            for way, threads in (("leave", COPIERS), ("come", COPIERS), ("write", PARTS))
        )
        self._written: dict[int, Future[None]] = {}

    def __enter__(self) -> Self:
        """Nothing is kept yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the threads; the writer has ended before."""
        for threads in (self._coming, self._leaving, self._writing):
            threads.shutdown()

    def put(self, block: int, batch: int, states: torch.Tensor) -> None:
        """Keep the states of a batch before a block."""
        states = states.detach()
        kept: Future[torch.Tensor] = Future()
        if states.is_cuda and self._device.type == "cpu":  # by a thread, which waits until they are computed
            kept = self._leaving.submit(self._leave, states, now(states.device))
        else:
            kept.set_result(states)
        self._kept.setdefault(block, {})[batch] = kept
        self._bytes[block] += states.nbytes

    def close(self, block: int) -> None:
        """Say that the states of all batches before a block are there: they go to disk, and then out of memory."""
        if self._checkpoints is None:
            return
        if self.has(block):  # from a pass that was killed
            del self._kept[block]
            return
        self._writer.wait_for_room()
        write = partial(self._write, block, dict(self._kept[block]))
        self._written[block] = self._writer.submit(write, self._bytes.pop(block))
        for number in [number for number, written in self._written.items() if written.done()]:
            self._written.pop(number).result()
            self._kept.pop(number, None)

    def _write(self, block: int, kept: dict[int, "Future[torch.Tensor]"]) -> None:
        """Write the states before a block in parts, and then an empty set, which says that all are there."""
        assert self._checkpoints is not None
        written = [self._writing.submit(self._write_part, block, part, kept) for part in range(PARTS)]
        for future in written:
            future.result()
        self._checkpoints.save(self._set(block), {})

    def _write_part(self, block: int, part: int, kept: dict[int, "Future[torch.Tensor]"]) -> None:
        assert self._checkpoints is not None
        states = {str(batch): states.result() for batch, states in kept.items() if batch % PARTS == part}
        if states:
            self._checkpoints.save(self._part(block, part), states)

    def has(self, block: int) -> bool:
        """Whether the states of all batches before a block are on disk."""
        return self._checkpoints is not None and self._checkpoints.has(self._set(block))

    def get(self, block: int, batch: int, device: torch.device) -> torch.Tensor:
        """The states of a batch before a block, on the device."""
        return self._begin(block, batch, device)()

    def each(
        self, block: int, shares: Sequence[Sequence[int]], devices: Sequence[torch.device]
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(number of the device, batch, its states before a block): the batches of each device, one of each in turn.

        While a device computes with the states of a batch, those of its next one come to it.
        """
        turns, coming = list(in_turn(shares)), deque[Callable[[], torch.Tensor]]()
        for number, (share, batch) in enumerate(turns):
            for ahead, other in turns[number + len(coming) : number + len(shares) + 1]:
                coming.append(self._begin(block, other, devices[ahead]))
            yield share, batch, coming.popleft()()

    def _begin(self, block: int, batch: int, device: torch.device) -> Callable[[], torch.Tensor]:
        """Begin to bring states to a device; gives the function that waits for them."""
        if block in self._kept:
            source = self._kept[block][batch]
            if device.type != "cuda" or self._device.type == "cuda":
                return lambda: source.result().to(device)
            states = source.result()
        else:
            assert self._checkpoints is not None
            one = partial(self._checkpoints.one, self._part(block, batch % PARTS), str(batch))
            if device.type != "cuda":
                return lambda: one().clone().to(device)  # else the file's pages stay in memory
            states = one()
        # Memory from what the computing stream has freed: a thread's own stream would have a pool of its own.
        into = torch.empty(states.shape, dtype=states.dtype, device=device)
        return self._coming.submit(self._come, states, into, now(device)).result

    def _come(self, states: torch.Tensor, into: torch.Tensor, free: object) -> torch.Tensor:
        self._transfer().to_gpus(states, [into], [free])
        return into

    def _leave(self, states: torch.Tensor, computed: object) -> torch.Tensor:
        return self._transfer().to_host(states, computed)

    def _transfer(self) -> Transfer:
        """This thread's way to the GPUs."""
        if not hasattr(self._local, "transfer"):
            self._local.transfer = Transfer()
        transfer: Transfer = self._local.transfer
        return transfer

    def drop(self, block: int) -> None:
        """Forget the states before a block, on disk when all that was asked of the writer before is done."""
        self._kept.pop(block, None)
        self._written.pop(block, None)
        if self._checkpoints is not None:
            self._writer.submit(partial(self._drop, self._checkpoints, block))

    def _drop(self, checkpoints: Checkpoints, block: int) -> None:
        for name in (self._set(block), *(self._part(block, part) for part in range(PARTS))):
            checkpoints.drop(name)

    def _set(self, block: int) -> str:
        return f"{self._name}-{block:04}"

    def _part(self, block: int, part: int) -> str:
        return f"{self._set(block)}-{part}"
