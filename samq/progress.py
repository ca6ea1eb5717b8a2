"""Progress of long work: a function that is called with (done, total), so that samq/ does not need a terminal."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

Progress = Callable[[int, int], None]


def plain_console(**options: Any) -> Console:
    """A console that shows text as it is: `[` in a path is no markup, and `:key:` no emoji. `options` are rich's."""
    return Console(markup=False, emoji=False, **options)


console = plain_console(stderr=True)
if not console.is_terminal:
    console = plain_console(stderr=True, width=140)  # wide enough for the tables, in a log file
_lock = threading.Lock()
_display: RichProgress | None = None  # one for all threads, since rich draws only one at a time
_bars = 0


class _DoneOfTotal(ProgressColumn):
    """`12/80`, or `1.2/8.0 GB` for a bar of bytes; nothing while the total is not known."""

    _items = MofNCompleteColumn()
    _bytes = DownloadColumn()

    def render(self, task: Task) -> Text:
        column = self._bytes if task.fields["in_bytes"] and task.total else self._items
        return column.render(task)


def silent(done: int, total: int) -> None:
    """Report nothing."""


@contextmanager
def bar(description: str, *, in_bytes: bool = False) -> Iterator[Progress]:
    """Show a progress bar on the terminal during the `with` block; several may be open at once, in any threads.

    Yields the function to report progress to, in bytes if `in_bytes`.
    """
    global _display, _bars
    with _lock:
        if _display is None:
            _display = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                _DoneOfTotal(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )
            _display.start()
        display = _display
        _bars += 1
    task = display.add_task(description, total=None, in_bytes=in_bytes)
    try:
        yield lambda done, total: display.update(task, completed=done, total=total)
    finally:
        with _lock:
            display.remove_task(task)
            _bars -= 1
            if _bars == 0:
                display.stop()
                _display = None
