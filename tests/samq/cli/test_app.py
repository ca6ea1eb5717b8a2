"""The commands as a whole: their help, what they import, and the process around them."""

import sys

import pytest
import typer

from samq import __version__
from samq.cli.app import app
from tests.command_line import run
from tests.command_line import samq as samq_process

COMMANDS = typer.main.get_command(app).commands
SHORT_HELP = 62  # characters that `samq --help` shows of a command on a terminal of 80 columns


def test_help_lists_every_command_with_a_whole_sentence(samq):
    listed = samq("--help").stdout
    for name, command in COMMANDS.items():
        sentence = command.help.split(". ")[0].split("\n")[0].rstrip(".") + "."
        assert len(sentence) <= SHORT_HELP, name
        assert f"  {name} " in listed and sentence in listed


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_argument_and_option_is_described_by_sentences(command):
    for parameter in command.params:
        text = getattr(parameter, "help", None) or ""
        assert text[:1].isalpha() and text.split(" [default")[0].endswith("."), parameter.name


def test_the_process_prints_its_version_and_imports_nothing_slow(tmp_path):
    done = samq_process("--version", home=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"{__version__}\n")
    command = [sys.executable, "-c", "import sys, samq.cli.app; print(*sys.modules)"]
    slow = {"datasets", "gguf", "llama_cpp", "lm_eval", "mlflow", "numpy", "pandas", "prefect", "pydantic", "torch"}
    assert slow.isdisjoint(run(command, home=tmp_path).stdout.split())


def test_an_unknown_command_and_an_unknown_value_are_refused(samq, tmp_path):
    assert samq("quantise").returncode == 2
    done = samq("calibrate", "model", "--out", tmp_path / "map.json", "--labels", "tokens")
    assert done.returncode == 2 and "'--labels'" in done.stderr and "'model', 'text'" in done.stderr
