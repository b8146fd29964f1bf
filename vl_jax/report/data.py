"""The page of ``inspect data --html``: what the sources are like, what is wrong, and samples to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from vl_jax.data.config import PackingConfig
from vl_jax.data.stream.padding import WasteReport
from vl_jax.data.tools import preview
from vl_jax.data.tools.examination import Examination
from vl_jax.data.tools.preview import Preview
from vl_jax.report.charts import histogram, percent
from vl_jax.report.run import page

Padding = Mapping[str, tuple[PackingConfig, WasteReport]]  # by stage


def render(
    name: str,
    examinations: Sequence[Examination],
    padding: Padding,
    samples: Mapping[str, Sequence[Preview]],
    *,
    max_tokens: int,
    max_tiles: int,
) -> str:
    """The page of an experiment's data."""
    records = sum(e.num_records for e in examinations)
    examined = sum(e.num_examined for e in examinations)
    sections = [
        ("Sources", _sources(examinations)),
        ("Findings", _findings(examinations)),
        ("Lengths", _lengths(examinations, max_tokens, max_tiles)),
        ("Guessable without the picture", _guesses(examinations)),
        ("Padding", _padding(padding)),
    ]
    for source, previews in samples.items():
        sections.append((f"Samples of {escape(source)}", preview.to_html(previews)))
    lead = f"{len(examinations)} sources, {records:,} records, {examined:,} of them examined"
    return page(name, lead, sections, kind="data")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Rows of text, already escaped; columns of ``numbers`` stand right."""

    def cells(row: Sequence[str], tag: str) -> str:
        right = [' class="num"' if n in numbers else "" for n in range(len(row))]
        return "".join(f"<{tag}{at}>{cell}</{tag}>" for cell, at in zip(row, right, strict=True))

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="card scroll"><table><thead><tr>{cells(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _sources(examinations: Sequence[Examination]) -> str:
    head = ("source", "records", "examined", "usable", "tokens", "tiles", "turns", "guessed blind")
    rows = []
    for e in examinations:
        middle = [f"{np.median(x):,.0f}" if x else "–" for x in (e.tokens, e.tiles, e.turns)]
        counts = [f"{e.num_records:,}", f"{e.num_examined:,}", f"{e.num_usable:,}"]
        rows.append([escape(e.source), *counts, *middle, percent(e.blind)])
    note = '<p class="note">Tokens, tiles and turns: the median of a sample.</p>'
    return note + _table(head, rows, numbers=range(1, 8))


def _findings(examinations: Sequence[Examination]) -> str:
    rows = [
        (escape(e.source), escape(f.what), f"{f.count:,}", "<br>".join(map(escape, f.examples)))
        for e in examinations
        for f in e.findings
    ]
    if not rows:
        return '<p class="absent">Nothing is wrong with the records examined.</p>'
    return _table(("source", "finding", "times", "for example"), rows, numbers=(2,))


def _lengths(examinations: Sequence[Examination], max_tokens: int, max_tiles: int) -> str:
    cards = []
    for e in examinations:
        for unit, values, limit in (("tokens", e.tokens, max_tokens), ("tiles", e.tiles, max_tiles)):
            if not values or len(set(values)) == 1:
                continue
            over = sum(v > limit for v in values)
            title = f"{e.source}: {unit} of a sample"
            note = f"The line is max_{unit}={limit}; {over:,} of {len(values):,} are above."
            chart = histogram(values, title=title, limit=limit)
            cards.append(f'<div class="card"><h3>{escape(title)}</h3>{chart}<p class="note">{note}</p></div>')
    same: dict[str, list[str]] = {}
    for e in examinations:
        for unit, values in (("token", e.tokens), ("tile", e.tiles)):
            if values and len(set(values)) == 1:
                text = f"every sample has {values[0]:,} {unit}{'' if values[0] == 1 else 's'}."
                same.setdefault(text, []).append(e.source)
    lines = (f"{', '.join(sources)}: {text}" for text, sources in same.items())
    notes = "".join(f'<p class="note">{escape(line)}</p>' for line in lines)
    return f'{notes}<div class="grid">{"".join(cards)}</div>'


def _guesses(examinations: Sequence[Examination]) -> str:
    note = (
        '<p class="note">Questions that are asked often and have nearly always the same answer: a model '
        "learns them without looking. The share is of the answers seen.</p>"
    )
    rows = [
        (escape(e.source), escape(g.question), escape(g.answer), percent(g.share), f"{g.asked:,}")
        for e in examinations
        for g in e.guesses
    ]
    if not rows:
        return '<p class="absent">No question that was asked often has nearly always the same answer.</p>'
    return note + _table(("source", "question", "answer", "share", "asked"), rows, numbers=(3, 4))


def _padding(padding: Padding) -> str:
    head = ("stage", "rows of", "tokens packed", "tokens unpacked", "tiles packed", "tiles unpacked")
    rows = [
        (
            escape(stage),
            f"{row.max_tokens:,} tokens, {row.max_tiles:,} tiles",
            *map(percent, (w.packed.tokens, w.unpacked.tokens, w.packed.tiles, w.unpacked.tiles)),
        )
        for stage, (row, w) in padding.items()
    ]
    if not rows:
        return '<p class="absent">Rows hold one sample each.</p>'
    note = '<p class="note">Share of the rows that nothing would fill, predicted from the lengths.</p>'
    return note + _table(head, rows, numbers=range(2, 6))
