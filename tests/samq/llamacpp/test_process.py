import os
import signal
import subprocess
import sys
import time

import pytest

from samq.errors import ToolError
from samq.llamacpp.process import run


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().split()[2] != "Z"


def wait_until_dead(pid):
    deadline = time.monotonic() + 10
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} lives on"
        time.sleep(0.05)


def test_output_is_kept_and_lines_are_seen(tmp_path):
    lines = []
    text = run(["sh", "-c", "echo one; echo two >&2"], log=tmp_path / "log", timeout_s=10, on_line=lines.append)
    assert text == (tmp_path / "log").read_text() == "one\ntwo\n"
    assert lines == ["one", "two"]


def test_a_failure_names_the_program_its_last_line_and_the_log(tmp_path):
    with pytest.raises(ToolError, match=r"sh failed with exit code 3: no luck \(log: .*log\)"):
        run(["sh", "-c", "echo no luck; exit 3"], log=tmp_path / "log", timeout_s=10)


def test_a_crash_names_the_signal(tmp_path):
    with pytest.raises(ToolError, match=r"sh was killed by signal 11 \(Segmentation fault\): no output \(log: .*log\)"):
        run(["sh", "-c", "kill -SEGV $$"], log=tmp_path / "log", timeout_s=10)


def test_a_failure_on_a_full_disk_says_that_it_is_full(disk):
    fill = f"cat /dev/zero > {disk.folder}/model 2>/dev/null || exit 1"
    with pytest.raises(
        ToolError, match=r"sh failed with exit code 1: no output; the disk of .*disk is full, free some"
    ):
        run(["sh", "-c", fill], log=disk.folder / "log", timeout_s=60)


def test_an_assertion_of_llama_cpp_is_told_with_a_way_out(tmp_path):
    with pytest.raises(
        ToolError, match=r"\(Aborted\): /src/a\.cpp:1: GGML_ASSERT\(a != b\) failed; .* choose another model, or"
    ):
        run(
            ["sh", "-c", "echo '/src/a.cpp:1: GGML_ASSERT(a != b) failed'; kill -ABRT $$"],
            log=tmp_path / "log",
            timeout_s=10,
        )


def test_a_missing_program_is_one_sentence(tmp_path):
    with pytest.raises(ToolError, match="cannot start /nothing/here: No such file"):
        run(["/nothing/here"], log=tmp_path / "log", timeout_s=10)


def test_a_hung_child_is_killed_with_its_children(tmp_path):
    script = f"sleep 60 & echo $! > {tmp_path}/pid; wait"
    with pytest.raises(ToolError, match="was stopped after 1 s"):
        run(["sh", "-c", script], log=tmp_path / "log", timeout_s=1)
    wait_until_dead(int((tmp_path / "pid").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="PDEATHSIG is Linux's")
def test_a_child_dies_with_a_killed_parent(tmp_path):
    code = f"""
from pathlib import Path
from samq.llamacpp.process import run
run(["sh", "-c", "echo $$ > {tmp_path}/pid; exec sleep 60"], log=Path({str(tmp_path / "log")!r}), timeout_s=60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until_dead(int((tmp_path / "pid").read_text()))


def test_no_lock_that_another_thread_holds_stops_a_start(tmp_path):
    """What runs between fork and exec may wait for such a lock for ever."""
    code = f"""
import os, threading
from pathlib import Path
from samq.llamacpp.process import run
held = threading.Lock()
held.acquire()
os.register_at_fork(after_in_child=held.acquire)
print(run(["sh", "-c", "ulimit -s; echo ran"], log=Path({str(tmp_path / "log")!r}), timeout_s=20, stack=2**25))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    stack, ran = done.stdout.split()
    assert ran == "ran" and (stack == "unlimited" or int(stack) >= 2**15)


def test_what_cannot_run_says_so(tmp_path):
    (tmp_path / "text").write_text("no program")
    with pytest.raises(ToolError, match=r"cannot start .*text: Permission denied"):
        run([tmp_path / "text"], log=tmp_path / "log", timeout_s=10)
    (tmp_path / "text").chmod(0o755)
    with pytest.raises(ToolError, match=r"text failed with exit code 126: cannot run .*text: Exec format error"):
        run([tmp_path / "text"], log=tmp_path / "log", timeout_s=10)
