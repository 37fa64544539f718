"""Results as tables: for the terminal and for Markdown, from the same columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]
_MIN_WIDTH = 120


@dataclass(frozen=True)
class Column:
    """A heading and what stands below it: the field `key` of a row, or what `key` makes of the row, in a format. A
    column that `is_detail` is for files and pages, for which terminals have no room."""

    heading: str
    key: str | Callable[[Row], Any]
    format: str = ""
    is_detail: bool = False

    def cell(self, row: Row) -> str:
        """`-` for what is not known."""
        value = row.get(self.key) if isinstance(self.key, str) else self.key(row)
        return "-" if value is None else format(value, self.format)


@dataclass(frozen=True)
class ResultTable:
    """Rows under columns, the first of which is aligned to the left."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]

    def print(self, console: Console) -> None:
        """On a terminal; a narrow one breaks lines rather than cutting figures off."""
        columns = [column for column in self.columns if not column.is_detail]
        table = Table(title=self.title, box=box.SIMPLE, padding=(0, 1, 0, 0))
        for index, column in enumerate(columns):
            table.add_column(column.heading, justify="right" if index else "left", no_wrap=index == 0)
        for row in self.rows:
            table.add_row(*(column.cell(row) for column in columns))
        Console(file=console.file, width=max(console.width, _MIN_WIDTH)).print(table)


def markdown_table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    lines = [[column.heading for column in columns], *([column.cell(row) for column in columns] for row in rows)]
    head, *body = ["| " + " | ".join(cells) + " |" for cells in lines]
    return "\n".join([head, "|---" + "|---:" * (len(columns) - 1) + "|", *body])
