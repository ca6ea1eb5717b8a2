"""What a reader holds at once stays small: parameters of a function, lines of a function, lines of a file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARAMETERS = 8  # outside the command line, where each is an option
FUNCTION_LINES = 80
FILE_LINES = 400
COMMAND_FILE_LINES = 250
FILES = sorted(path for room in ("samq", "tasks", "flows", "deployments") for path in (ROOT / room).rglob("*.py"))


def too_large(source: str, is_command: bool) -> Iterator[str]:
    lines = len(source.splitlines())
    if lines > (COMMAND_FILE_LINES if is_command else FILE_LINES):
        yield f"the file has {lines} lines"
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        arguments = node.args
        parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        named = [each for each in parameters if each is not None and each.arg not in ("self", "cls")]
        if len(named) > PARAMETERS and not is_command:
            yield f"{node.name} has {len(named)} parameters"
        length = node.end_lineno - node.lineno + 1
        if length > FUNCTION_LINES:
            yield f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_functions_and_parameter_lists_stay_small(path):
    assert not list(too_large(path.read_text(), is_command="cli" in path.parts))


def test_what_is_too_large_is_found():
    nine = "a, b, c, d, e, /, f, g, *h, i"
    assert list(too_large(f"class A:\n    def f(self, {nine}): pass", is_command=False)) == ["f has 9 parameters"]
    assert not list(too_large(f"def f({nine}): pass", is_command=True))
    assert list(too_large("def f():\n" + "    pass\n" * 80, is_command=True)) == ["f has 81 lines"]
    assert list(too_large("\n" * 251, is_command=True)) == ["the file has 251 lines"]
    assert not list(too_large("\n" * 251, is_command=False))
