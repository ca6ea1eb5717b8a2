import socket
import sys
import threading

import pytest

from samq.datasets import packaged_rows
from samq.evaluation.sandbox import CodeLimits, isolation, run_tests

CONFINED = pytest.mark.skipif(isolation().startswith("not confined"), reason=isolation())
QUICK = CodeLimits(seconds=1)


def test_code_that_gets_to_the_end_of_its_tests_passes():
    outcome = run_tests("def double(x):\n    return 2 * x", "assert double(2) == 4")
    assert outcome.passed and outcome.error is None
    outcome = run_tests("def double(x):\n    return 3 * x", "assert double(2) == 4, 'not doubled'")
    assert not outcome.passed and outcome.error == "AssertionError: not doubled"


def test_every_canonical_solution_of_human_eval_passes_and_an_empty_one_does_not():
    rows = packaged_rows("humaneval")
    for row in rows[:20]:
        tests = f"{row['test']}\ncheck({row['entry_point']})"
        assert run_tests(row["prompt"] + row["canonical_solution"], tests).error is None, row["task_id"]
        assert not run_tests(row["prompt"] + "    pass\n", tests).passed, row["task_id"]


@pytest.mark.parametrize(
    ("solution", "error"),
    [
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("raise SystemExit", "SystemExit"),
        ("import os\nos._exit(0)", "ended by itself with code 0"),
        ("import ctypes\nctypes.string_at(0)", "ended by itself with code -11"),
        ("print('passed')\nquit()", "NameError"),
        ("answer = input()", "EOFError"),
        ("class Odd(Exception):\n    def __str__(self):\n        raise ValueError\nraise Odd", "ended by itself"),
    ],
)
def test_code_that_ends_early_does_not_pass(solution, error):
    outcome = run_tests(solution, "")
    assert not outcome.passed and error in outcome.error


@pytest.mark.parametrize(
    "solution",
    [
        "while True:\n    pass",
        "import time\ntime.sleep(60)",
        "import os\nos.closerange(0, 64)\nwhile True:\n    pass",
        "import signal\nfor number in range(1, 32):\n    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True:\n    pass",
    ],
)
def test_code_that_goes_on_is_stopped(solution):
    assert run_tests(solution, "", QUICK).error == "was stopped after 1 s"


def test_memory_and_files_have_a_limit_that_stays():
    little = CodeLimits(memory_bytes=2**28, file_bytes=1000)
    assert run_tests("x = bytearray(2**29)", "", little).error.startswith("MemoryError")
    assert run_tests("x = [0]\nwhile True:\n    x += x", "", little).error.startswith("MemoryError")
    assert "File too large" in run_tests("with open('x', 'w') as file:\n    file.write(1001 * 'x')", "", little).error
    assert run_tests("open('x', 'w').write(999 * 'x')", "", little).passed
    raise_it = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))"
    assert "not allowed" in run_tests(raise_it, "", little).error


def test_shouting_into_every_open_file_is_no_success():
    shout = "import os\nfor number in range(64):\n    try:\n        os.write(number, b'\\n' + 32 * b'x')\n"
    outcome = run_tests(shout + "    except OSError:\n        pass", "assert False")
    assert not outcome.passed


def test_code_cannot_find_its_tests_before_they_run():
    look = """
import gc, os, sys
seen = [open(name).read() for name in os.listdir() if os.path.isfile(name)]
frame = sys._getframe()
while frame:
    seen += map(repr, [frame.f_locals, frame.f_globals, frame.f_code.co_consts])
    frame = frame.f_back
seen += [repr(thing) for thing in gc.get_objects() if isinstance(thing, (list, dict, tuple))]
seen += [repr(sys.argv), repr(os.environ)]
found = any("rewsna_terces"[::-1] in text for text in seen)
"""
    assert run_tests(look, "assert not found\nsecret_answer = 1").error is None


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "mine")
    outcome = run_tests("import os, sys", "assert 'HF_TOKEN' not in os.environ and not os.listdir()")
    assert outcome.error is None
    assert "ModuleNotFoundError" in run_tests("import samq", "").error


@CONFINED
@pytest.mark.parametrize(
    "solution",
    [
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os, signal\nos.kill(os.getppid(), 0)",
        "import os\nos.chmod('.', 0o777)",
    ],
)
def test_code_cannot_start_or_touch_other_processes(solution):
    assert "Operation not permitted" in run_tests(solution, "").error


@CONFINED
def test_code_may_use_threads():
    use = "import threading\ndone = []\nthread = threading.Thread(target=done.append, args=(1,))\nthread.start()\nthread.join()"
    assert run_tests(use, "assert done == [1]").error is None


@CONFINED
def test_code_writes_and_reads_in_its_own_folder_only(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    for solution in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(kept)!r}, 'a')",
        f"open({str(kept)!r})",
        f"import os\nos.remove({str(kept)!r})",
        f"import os\nos.symlink({str(kept)!r}, 'link')\nopen('link', 'w')",
        "open('/proc/self/mem', 'r+b')",
    ):
        assert "Permission denied" in run_tests(solution, "").error, solution
    assert kept.read_text() == "kept" and list(tmp_path.iterdir()) == [kept]
    assert run_tests("open('x', 'w').write('y')", "assert open('x').read() == 'y'").error is None


@CONFINED
def test_code_has_no_network():
    connected = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: (server.accept(), connected.set()), daemon=True)
        thread.start()
        outcome = run_tests(f"import socket\nsocket.create_connection({server.getsockname()!r}, timeout=1)", "")
        assert "Operation not permitted" in outcome.error and not connected.is_set()
        with socket.create_connection(server.getsockname()):  # without the sandbox it works
            assert connected.wait(10)


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp and Landlock are Linux's")
def test_what_keeps_code_from_harm_is_said_in_words():
    assert isolation().startswith(("no network", "not confined: "))
