"""Progress of long work: a function called with (done, total), so that samq/ needs no terminal."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Progress = Callable[[int, int], None]

console = Console(stderr=True)
if not console.is_terminal:
    console = Console(stderr=True, width=140)  # a log file has room for the tables
_lock = threading.Lock()
_display: RichProgress | None = None  # one for all threads: rich draws only one at a time
_bars = 0


def silent(done: int, total: int) -> None:
    """Report nothing."""


@contextmanager
def bar(description: str) -> Iterator[Progress]:
    """A progress bar on the terminal for the time of the `with` block; several may be open, in any threads."""
    global _display, _bars
    with _lock:
        if _display is None:
            _display = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )
            _display.start()
        display = _display
        _bars += 1
    task = display.add_task(description, total=None)
    try:
        yield lambda done, total: display.update(task, completed=done, total=total)
    finally:
        with _lock:
            display.remove_task(task)
            _bars -= 1
            if _bars == 0:
                display.stop()
                _display = None
