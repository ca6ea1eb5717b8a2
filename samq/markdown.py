"""Markdown tables and lists of arbitrary text, which cannot break their layout."""

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with these column headings."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(one_line(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def bullets(items: Iterable[str]) -> str:
    """A bulleted list."""
    return "\n".join(f"- {one_line(item)}" for item in items)


def one_line(text: str) -> str:
    """The text without line breaks."""
    return " ".join(text.split())
