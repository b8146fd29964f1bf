"""A table of text, in the forms that pages, papers and spreadsheets read."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from html import escape

_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "−": "$-$",
    "≤": r"$\le$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """What stands in a table.

    Attributes:
      text: for people.
      value: for spreadsheets; empty: the text.
      best: whether it is marked as the best of its column.
      link: where it leads, on a page.
      mood: ``good`` or ``bad`` colours it, on a page.
    """

    text: str
    value: str = ""
    best: bool = False
    link: str = ""
    mood: str = ""


@dataclasses.dataclass(frozen=True)
class TextTable:
    """Rows of cells below a head; all columns but the first ``left`` are of numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left: int = 1


def to_html(table: TextTable) -> str:
    """A card with the table, which scrolls where it is too wide."""
    head = "".join(f"<th{_number(n >= table.left)}>{escape(name)}</th>" for n, name in enumerate(table.head))
    body = ""
    for row in table.rows:
        body += f"<tr>{''.join(_html_cell(cell, n >= table.left, n == 0) for n, cell in enumerate(row))}</tr>"
    inside = f'<table class="comparison"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="card wide"><div class="scroll">{inside}</div></div>'


def to_markdown(table: TextTable) -> str:
    """A table as GitHub reads it; the best are bold."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = line(["---" if n < table.left else "---:" for n in range(len(table.head))])
    rows = [line([f"**{c.text}**" if c.best else c.text for c in row]) for row in table.rows]
    return "\n".join([line(table.head), rule, *rows]) + "\n"


def to_csv(table: TextTable) -> str:
    """A table for a spreadsheet, with all digits."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.head)
    writer.writerows([cell.value or cell.text for cell in row] for row in table.rows)
    return buffer.getvalue()


def to_latex(table: TextTable) -> str:
    """A table for a paper, in the style of the package booktabs; the best are bold."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(cells) + r" \\"

    columns = "l" * table.left + "r" * (len(table.head) - table.left)
    rows = [
        line([rf"\textbf{{{latex(c.text)}}}" if c.best else latex(c.text) for c in row]) for row in table.rows
    ]
    head = line([latex(name) for name in table.head])
    parts = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows]
    return "\n".join([*parts, r"\bottomrule", r"\end{tabular}"]) + "\n"


def latex(text: str) -> str:
    """A text as LaTeX prints it."""
    return "".join(_LATEX.get(c, c) for c in text)


def mark_best(columns: Mapping[int, str], values: Sequence[Sequence[float | None]]) -> set[tuple[int, int]]:
    """Row and column of the best values.

    Args:
      columns: which way a column is better, ``lower`` or ``higher``, by its number.
      values: by row and column; a column with fewer than two different values has no best.
    """
    best = set()
    for column, way in columns.items():
        known = {n: row[column] for n, row in enumerate(values) if row[column] is not None}
        if len(set(known.values())) > 1:
            top = (min if way == "lower" else max)(known.values())  # pyright: ignore[reportArgumentType]
            best |= {(n, column) for n, value in known.items() if value == top}
    return best


def _number(is_number: bool) -> str:
    return ' class="num"' if is_number else ""


def _html_cell(cell: Cell, is_number: bool, is_first: bool) -> str:
    text = escape(cell.text)
    if cell.link:
        text = f'<a href="{escape(cell.link)}">{text}</a>'
    if cell.best:
        text = f"<b>{text}</b>"
    if cell.mood:
        text = f'<span class="verdict {cell.mood}">{text}</span>'
    tag = "th" if is_first else "td"
    return f"<{tag}{_number(is_number)}>{text}</{tag}>"
