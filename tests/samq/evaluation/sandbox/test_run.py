import ctypes
import os
import secrets
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from samq.data.datasets import packaged_rows
from samq.evaluation.sandbox import run as sandbox
from samq.evaluation.sandbox.run import CodeLimits, isolation, run_tests


def kernel_confines() -> bool:
    """Whether this kernel offers all that the sandbox needs, whatever the sandbox makes of it."""
    actions = Path("/proc/sys/kernel/seccomp/actions_avail")
    if os.uname().machine not in ("x86_64", "aarch64") or not actions.exists():
        return False
    create_ruleset, null, only_its_version = 444, ctypes.c_void_p(), 1
    landlock = ctypes.CDLL(None).syscall(create_ruleset, null, ctypes.c_size_t(0), only_its_version)
    return landlock >= 1 and {"errno", "kill_process"} <= set(actions.read_text().split())


CONFINED = pytest.mark.skipif(not kernel_confines(), reason="this kernel lacks seccomp or Landlock")
QUICK = CodeLimits(seconds=1)


def test_code_that_gets_to_the_end_of_its_tests_passes():
    outcome = run_tests("def double(x):\n    return 2 * x", "assert double(2) == 4")
    assert outcome.passed and outcome.error is None
    outcome = run_tests("def double(x):\n    return 3 * x", "assert double(2) == 4, 'not doubled'")
    assert not outcome.passed and outcome.error == "AssertionError: not doubled"


@pytest.mark.slow
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


@pytest.mark.slow  # each runs to its limit
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
        "import ctypes, os\nctypes.CDLL(None, use_errno=True).syscall(469, -100, b'.', bytes(24), 24, 0)\n"
        "raise Exception(os.strerror(ctypes.get_errno()))",
    ],
)
def test_code_cannot_start_or_touch_other_processes(solution):
    assert "Operation not permitted" in run_tests(solution, "").error


def as_ordinary_user(tmp_path, monkeypatch, first=""):
    """Let the sandbox's child be an ordinary user's, as root is spared limits; and let it do something first."""
    become = "import os\nif os.getuid() == 0:\n    os.setgroups([])\n    os.setgid(65534)\n    os.setuid(65534)\n"
    if subprocess.run([sys.executable, "-c", become], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this root cannot become an ordinary user")
    # all imports before, as root's Python may lie where only root can read
    child = (
        f"import sys, threading\nsys.path.append({str(Path(sandbox.__file__).parent)!r})\nimport child, confinement\n"
    )
    (tmp_path / "wrapper.py").write_text(f"{child}{become}{first}\nchild.main(*map(int, sys.argv[-4:]))")
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S -B {tmp_path / "wrapper.py"} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


USE_A_THREAD = """
import os, threading
done = []
thread = threading.Thread(target=lambda: done.append(os.getuid()))
thread.start()
thread.join()
"""


@CONFINED
def test_code_may_use_threads():
    assert run_tests(USE_A_THREAD, "assert done").error is None


@CONFINED
def test_code_may_use_threads_but_not_processes_as_an_ordinary_user(tmp_path, monkeypatch):
    as_ordinary_user(tmp_path, monkeypatch)
    outcome = run_tests(USE_A_THREAD, "assert done[0] > 0")
    assert outcome.error is None and not outcome.unconfined
    assert "Operation not permitted" in run_tests("import os\nos.fork()", "").error


@CONFINED
def test_code_may_use_asyncio():
    assert run_tests("import asyncio\nasyncio.run(asyncio.sleep(0))", "").error is None
    wake = "import asyncio\nasync def main():\n    return await asyncio.to_thread(lambda: 1)\nx = asyncio.run(main())"
    assert run_tests(wake, "assert x == 1").error is None


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no seccomp that could be missing")
def test_without_seccomp_an_ordinary_users_code_still_starts_no_process(tmp_path, monkeypatch):
    as_ordinary_user(tmp_path, monkeypatch, first="confinement.platform.machine = lambda: 'pdp11'")
    outcome = run_tests("import os\nos.fork()", "")
    assert outcome.error.startswith("BlockingIOError")
    assert "network, processes, and permissions and lengths of files: the calls of pdp11 are not" in outcome.unconfined


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
@pytest.mark.parametrize(
    "empty",
    [
        "os.truncate({path!r}, 0)",
        "os.open({path!r}, os.O_RDONLY | os.O_TRUNC)",
        "os.open({path!r}, os.O_ACCMODE | os.O_TRUNC)",
        "call(2 if os.uname().machine == 'x86_64' else -1, {path!r}.encode(), os.O_TRUNC)",  # open, which arm64 lacks
        "call(437, -100, {path!r}.encode(), os.O_TRUNC.to_bytes(24, 'little'), 24)",  # openat2
    ],
)
def test_code_cannot_empty_a_file_without_a_right_to_write(tmp_path, empty):
    """Refused by seccomp, also in its own folder: Landlock before Linux 6.2 would let it pass everywhere."""
    kept = tmp_path / "kept"
    kept.write_text("kept")
    prepare = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(*numbers):
    if libc.syscall(*numbers) < 0:
        raise Exception(os.strerror(ctypes.get_errno()))
open("own", "w").close()
"""
    for path in (str(kept), "own"):
        error = run_tests(prepare + empty.format(path=path), "").error
        assert any(reason in error for reason in ("Operation not permitted", "Function not implemented")), error
    assert kept.read_text() == "kept"


@CONFINED
def test_code_may_empty_its_own_file_where_it_may_write():
    write = "import os\nopen('x', 'w').write('long')\nopen('x', 'w').write('text')\n"
    assert run_tests(write, "assert open('x').read() == 'text'").error is None
    assert run_tests(
        write + "with open('x', 'r+') as file:\n    file.truncate(1)", "assert open('x').read() == 't'"
    ).passed
    assert run_tests(write + "os.close(os.open('x', os.O_RDWR | os.O_TRUNC))", "assert not open('x').read()").passed


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


@CONFINED
@pytest.mark.parametrize("abstract", [False, True])
def test_code_reaches_no_socket_of_this_machine(tmp_path, abstract):
    name = f"\0samq-{secrets.token_hex(8)}" if abstract else str(tmp_path / "server")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client,
    ):
        server.bind(name)
        server.setblocking(False)
        for reach in (f"sendto(b'x', {name!r})", f"sendmsg([b'x'], [], 0, {name!r})", f"connect({name!r})"):
            solution = f"import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\na.{reach}"
            assert "Operation not permitted" in run_tests(solution, "").error, reach
        with pytest.raises(BlockingIOError):
            server.recv(1)
        client.sendto(b"x", name)  # without the sandbox it works
        assert server.recv(1) == b"x"


@CONFINED
@pytest.mark.parametrize("call", ["bind('mine')", "listen()", "accept()"])
def test_code_cannot_be_reached(call):
    assert "Operation not permitted" in run_tests(f"import socket\nsocket.socketpair()[0].{call}", "").error


@CONFINED
def test_code_gets_no_pairs_of_other_sockets():
    solution = "import socket\nsocket.socketpair(socket.AF_INET)"
    assert "Operation not permitted" in run_tests(solution, "").error


@CONFINED
def test_all_is_confined_where_the_kernel_can():
    assert isolation() == "no network, no new processes, files in its own folder only"


def test_a_child_that_ends_before_it_reports_does_not_count_as_confined():
    assert run_tests("", "", CodeLimits(seconds=0.0001)).unconfined.startswith("unknown")
    twice = """
import sys
from samq.evaluation.sandbox.run import isolation
python, sys.executable = sys.executable, "/bin/false"
print(isolation())
sys.executable = python
print(isolation())
"""
    first, second = subprocess.check_output([sys.executable, "-c", twice], text=True).splitlines()
    assert first == "not confined: unknown, as the child ended before it could say"
    assert second == isolation() != first
