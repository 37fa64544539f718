"""Parts of a page in Markdown."""

from __future__ import annotations

from collections.abc import Iterable


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A table; bars and line breaks inside cells are escaped."""
    lines = [header, ("---",) * len(header), *(tuple(map(_cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code(text: str) -> str:
    return f"`{text}`"


def page(title: str, source: str, *parts: str) -> str:
    """A whole page, which names what it is made from."""
    note = f"<!-- Generated from {source} by `make docs`; change that instead. -->"
    return "\n\n".join((f"# {title}", note, *parts)) + "\n"


def _cell(text: str) -> str:
    # Angle brackets outside of code would be taken for HTML.
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    return "`".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))
