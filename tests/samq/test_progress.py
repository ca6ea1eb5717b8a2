import io
import threading

import pytest
from rich.console import Console
from rich.table import Table

from samq import progress


def test_a_bar_shows_what_is_done_of_how_much(terminal):
    with progress.bar("calibrate tiny") as report:
        report(3, 7)
    assert "calibrate tiny" in terminal.getvalue() and "3/7" in terminal.getvalue()


def test_a_bar_of_bytes_shows_them_in_a_unit_that_people_read(terminal):
    with progress.bar("find org/large", in_bytes=True) as report:
        report(1_200_000_000, 8_000_000_000)
    assert "1.2/8.0 GB" in terminal.getvalue()


def test_bars_of_several_threads_share_the_terminal_and_it_is_free_afterwards(terminal):
    both = threading.Barrier(2)

    def work(name):
        with progress.bar(name) as report:
            both.wait()
            report(1, 2)
            both.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("quantize one", "quantize two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "quantize one" in terminal.getvalue() and "quantize two" in terminal.getvalue()
    with progress.bar("alone"), pytest.raises(ZeroDivisionError), progress.bar("fails"):
        raise ZeroDivisionError
    assert progress._display is None


def test_without_a_terminal_nothing_is_drawn(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=log))
    with progress.bar("calibrate") as report:
        report(1, 2)
    assert log.getvalue().strip() == ""


def test_text_is_shown_as_it_is(terminal):
    """Rich takes brackets for markup, and colons for emoji."""
    name = "model[bold][/]-:key:.gguf"
    progress.console.print(name, Table("file", name, title=name), highlight=False)
    with progress.bar(f"open {name}"):
        pass
    shown = terminal.getvalue()
    assert shown.count(name) >= 4 and f"open {name}" in shown


def test_the_commands_console_shows_text_as_it_is(capsys):
    progress.console.print("model[final]-:key:.gguf", highlight=False)
    assert "model[final]-:key:.gguf" in capsys.readouterr().err
