"""What README.md, CONTRIBUTING.md and docs/ tell people to type exists, and the README is easy to read."""

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from flows.parameters import RequantizeParameters
from samq.cli.app import app
from samq.promotion.policy import PromotionPolicy

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND_LINE = typer.main.get_command(app)
CHECKED_OUT = ("benchmarks", "deployments", "docs", "flows", "samq", "scripts", "tasks", "tests")
LONGEST_SENTENCE = 25  # words


def code_lines(text: str) -> Iterator[str]:
    """Lines of fenced and indented code, continued lines joined."""
    fenced, line = False, ""
    for raw in text.splitlines():
        if raw.strip().startswith("```"):
            fenced = not fenced
        elif fenced or raw.startswith("    "):
            line += raw.strip()
            if line.endswith("\\"):
                line = line[:-1]
                continue
            yield line
            line = ""


def commands(line: str, program: str) -> Iterator[list[str]]:
    """The arguments of each call of a program in a line of shell."""
    if not re.search(rf"\b{program} ", line) or line.startswith("#"):
        return
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # not a line of shell
        return
    while words and re.fullmatch(r"\w+=.*", words[0]):  # the environment
        words = words[1:]
    if words and words[0].removeprefix(".venv/bin/") == program:
        yield words[1:]


def code_spans(text: str) -> Iterator[str]:
    """Code in running text."""
    yield from (" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text))


def without_code_blocks(text: str) -> str:
    return re.sub(r"^\s*```.*?^\s*```", "", text, flags=re.M | re.S)


def find_command(arguments: list[str]) -> tuple[Any, str, list[str]]:
    """The command that arguments name, its full name, and what is left of them; fails if there is none."""
    command, name, rest = COMMAND_LINE, "samq", list(arguments)
    while rest and (subcommands := getattr(command, "commands", None)) and not rest[0].startswith("-"):
        assert rest[0] in subcommands, f"{name} has no command {rest[0]}"
        name, command, rest = f"{name} {rest[0]}", subcommands[rest[0]], rest[1:]
    return command, name, rest


def unknown_options(arguments: list[str]) -> list[str]:
    """Options that the command of these arguments does not have; those of lm-eval are lm-eval's own."""
    command, _, rest = find_command(arguments)
    if command.context_settings.get("ignore_unknown_options"):
        return []
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return [word for word in rest if word.startswith("--") and word.partition("=")[0] not in known | {"--help"}]


def parse(arguments: list[str]) -> None:
    """Parse arguments as the command line would, without running anything; fails if it would refuse them."""
    command, name, rest = find_command(arguments)
    if "--help" not in rest and command is not COMMAND_LINE:
        command.make_context(name, rest)


def lines_of(program: str) -> list[tuple[Path, list[str]]]:
    return [
        (page, arguments)
        for page in PAGES
        for line in code_lines(page.read_text())
        for arguments in commands(line, program)
    ]


def yaml_examples() -> list[tuple[Path, dict[str, Any]]]:
    """The YAML in fenced code."""
    return [
        (page, yaml.safe_load(textwrap.dedent(block)))
        for page in PAGES
        for block in re.findall(r"^ *```yaml\n(.*?)^ *```", page.read_text(), re.M | re.S)
    ]


def show(value: object) -> str:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else " ".join(map(str, value))  # arguments, or keys


@pytest.mark.parametrize("page, arguments", lines_of("samq"), ids=show)
def test_a_command_line_of_the_documentation_parses(page, arguments):
    assert unknown_options(arguments) == []
    parse(arguments)


def test_command_lines_are_found():
    assert len({tuple(arguments[:1]) for _, arguments in lines_of("samq")}) > 10


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("rqeuantize --config x.yaml", "no command rqeuantize"),
        ("plan --map x.json --gguf y.gguf --bugdet 1GB", "--bugdet"),
        ("plan --budget 1GB", "Missing"),
        ("evaluate x.gguf --baseline y.gguf --chunks many", "integer"),
    ],
)
def test_a_command_line_that_would_be_refused_is_found(wrong, message):
    with pytest.raises(Exception, match=message):  # typer's own, or this file's assertions
        assert unknown_options(wrong.split()) == []
        parse(wrong.split())


@pytest.mark.parametrize("page", PAGES, ids=show)
def test_a_command_named_in_running_text_exists(page):
    for span in code_spans(without_code_blocks(page.read_text())):
        if span.startswith("samq ") and "." not in span.split()[1]:
            assert unknown_options(span.split()[1:]) == [], span


@pytest.mark.parametrize("page", PAGES, ids=show)
def test_a_make_target_exists(page):
    text = page.read_text()
    spans = [*code_spans(without_code_blocks(text)), *code_lines(text)]
    named = {target for span in spans for target in re.findall(r"\bmake ([a-z][a-z-]*)", span)}
    there = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert named - there == set()


@pytest.mark.parametrize("page", PAGES, ids=show)
def test_a_file_of_the_checkout_exists(page):
    text = page.read_text()
    named = {
        path.rstrip("./")
        for code in [*code_spans(without_code_blocks(text)), *code_lines(text)]
        for path in re.findall(rf"(?<![\w/.-])(?:{'|'.join(CHECKED_OUT)})/[\w./-]+", code)
    }
    assert {path for path in named if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("page, example", yaml_examples(), ids=show)
def test_a_yaml_example_is_valid(page, example):
    if example.keys() <= PromotionPolicy.model_fields.keys():
        PromotionPolicy.model_validate(example)
    elif example.keys() <= RequantizeParameters.model_fields.keys():
        demo = yaml.safe_load((ROOT / "deployments/parameters/demo.yaml").read_text())
        RequantizeParameters.model_validate(demo | {key: demo.get(key, {}) | part for key, part in example.items()})
    else:
        nightly = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"][0]
        assert example == {key: nightly[key] for key in example}


def test_links_and_pictures_of_the_readme_exist():
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README.read_text())
    assert len(links) > 10
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_the_readmes_table_is_of_the_same_run_as_the_benchmarks():
    rows = [
        {
            cells[0]: cells[1:4]
            for row in re.findall(r"^\| (Q\d.*) \|$", text, re.M)
            if len(cells := row.split(" | ")) > 2
        }
        for text in (README.read_text(), (ROOT / "docs/benchmarks.md").read_text())
    ]
    shown, measured = rows
    assert list(shown) == ["Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M"]
    assert shown == {mixture: measured[mixture] for mixture in shown}


def sentences(markdown: str) -> Iterator[str]:
    """The sentences of running text: headings, tables, code blocks, pictures and comments apart."""
    text = re.sub(r"<!--.*?-->", "", without_code_blocks(markdown), flags=re.S)
    blocks = [""]
    for line in text.splitlines():
        if not line.strip() or line.startswith(("    ", "#", "|", "![", "!!!")):
            blocks.append("")
        elif re.match(r"\s*([-*]|\d+\.|:) ", line):  # an item of a list
            blocks.append(re.sub(r"^\s*([-*]|\d+\.|:) +", "", line))
        else:
            blocks[-1] += f" {line}"
    for block in blocks:
        plain = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", block)  # a link is its text
        plain = re.sub(r"`[^`]*`", "code", plain).replace("*", "")
        yield from (part for part in re.split(r"(?<=[.!?])\s+", plain.strip()) if part)


def too_long(markdown: str) -> list[str]:
    return [sentence for sentence in sentences(markdown) if len(sentence.split()) > LONGEST_SENTENCE]


def test_the_readme_has_no_sentence_over_25_words():
    assert too_long(README.read_text()) == []


def test_a_long_sentence_is_found():
    words = " ".join(["word"] * 26)
    assert too_long(f"# {words}\n\n- A short one. {words}.\n") == [f"{words}."]
    assert too_long(f"| {words} |\n\n    {words}\n\nOne [link with {words[:60]}](x). Two.") == []
