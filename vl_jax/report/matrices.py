"""Matrices of shares as shaded tables: what is called what, and which experts which class goes to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any


def matrix_card(matrix: Mapping[str, Any]) -> str:
    """A table whose cells are the darker the larger their share of the row is."""
    values = matrix["values"]
    most = max((value for row in values for value in row), default=0.0) or 1.0
    head = "".join(f'<th class="num">{escape(name)}</th>' for name in matrix["columns"])
    corner = escape(" / ".join(name for name in (matrix["row_name"], matrix["column_name"]) if name))
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(_cell(value, most) for value in row)}</tr>"
        for name, row in zip(matrix["rows"], values, strict=True)
    )
    head = f"<thead><tr><th>{corner}</th>{head}</tr></thead>"
    table = f'<table class="scores matrix">{head}<tbody>{body}</tbody></table>'
    return f'<h3 style="margin:14px 0 6px">{escape(matrix["title"])}</h3><div class="scroll">{table}</div>'


def cards(matrices: Iterable[Mapping[str, Any]]) -> str:
    """The tables of one task; those of a single row tell something beside others alone: see ``joined``."""
    return "".join(matrix_card(matrix) for matrix in matrices if len(matrix["rows"]) != 1)


def joined(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tables of a single row put together over the results of several tasks, by their titles and columns.

    So a page shows which experts which domain goes to, where each source is of one domain.
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for result in results:
        for matrix in result.get("matrices", ()):
            if len(matrix["rows"]) != 1:
                continue
            table = found.setdefault(
                (matrix["title"], *matrix["columns"]), {**matrix, "rows": [], "values": []}
            )
            table["rows"] = [*table["rows"], *matrix["rows"]]
            table["values"] = [*table["values"], *matrix["values"]]
    return [table for table in found.values() if len(table["rows"]) > 1]


def _cell(value: float, most: float) -> str:
    """A share in per cent on its shade; nothing is written where it rounds to zero."""
    shade = 85 * value / most
    text = f"{100 * value:.0f}" if value >= 0.005 else ""
    return (
        f'<td class="num" style="background:color-mix(in oklab, var(--c1) {shade:.0f}%, transparent)" '
        f'title="{100 * value:.1f} %">{text}</td>'
    )
