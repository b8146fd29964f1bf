"""Cards of evaluated samples for the report: the picture with its boxes, and what the record holds.

Pictures are embedded as data URIs. Small ones are enlarged without smoothing, so that single pixels can be
inspected; large ones are reduced to keep the page light.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

# Cards of one task; more would make the page heavy without telling more.
MAX_SAMPLES = 30
_MAX_SIDE = 640
_CRISP_BELOW = 256
# Fields with a place of their own on a card; others are listed by name.
_PLACED = ("id", "question", "answer", "prediction", "correct", "image", "boxes")


def gallery(samples: Sequence[Mapping[str, Any]], *, folder: Path, kinds: Sequence[str]) -> str:
    """A grid of cards, as varied as possible, under a line saying how they were chosen.

    Args:
      samples: records, as described in ``evaluate/task.py``.
      folder: what the image paths of the records are relative to.
      kinds: the fields that samples are grouped by.
    """
    if not samples:
        return '<p class="absent">No samples were saved.</p>'
    # An evaluation keeps the pictures of some samples only; those come first.
    shown = choose([s for s in samples if s.get("image")], kinds, limit=MAX_SAMPLES)
    shown += choose([s for s in samples if not s.get("image")], kinds, limit=MAX_SAMPLES - len(shown))
    note, judged = f"{len(samples)} samples were saved.", [s for s in samples if "correct" in s]
    if judged:
        note = f"{sum(bool(s['correct']) for s in judged)} of {len(judged)} saved answers are right."
    if len(shown) < len(samples):
        varied = ", ".join(f"every {kind.replace('_', ' ')}" for kind in (*kinds, "verdict"))
        note += f" {len(shown)} shown: taken in turn from {varied}."
    cards = "".join(_card(sample, folder, kinds) for sample in shown)
    return f'<p class="note">{escape(note)}</p><div class="gallery">{cards}</div>'


def choose(
    samples: Sequence[Mapping[str, Any]], kinds: Sequence[str], *, limit: int
) -> list[Mapping[str, Any]]:
    """At most ``limit`` samples, taken in turn from the groups of all kinds and right or wrong."""
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for sample in samples:
        key = tuple(str(sample.get(name)) for name in (*kinds, "correct"))
        groups.setdefault(key, []).append(sample)
    turns = max(map(len, groups.values()), default=0)
    mixed = [group[turn] for turn in range(turns) for group in groups.values() if turn < len(group)]
    return mixed[:limit]


def _card(sample: Mapping[str, Any], folder: Path, kinds: Sequence[str]) -> str:
    verdict = ("right" if sample["correct"] else "wrong") if "correct" in sample else ""
    rows = [("answer", sample.get("prediction"), verdict), ("truth", sample.get("answer"), "")]
    rows += [
        (name.removesuffix("_prediction").replace("_", " "), value, "")
        for name, value in sample.items()
        if name not in (*_PLACED, *kinds) and isinstance(value, str | int | float)
    ]
    answers = "".join(
        f'<dt>{escape(name)}</dt><dd class="{style}">{escape(str(text)) or "(empty)"}</dd>'
        for name, text, style in rows
        if text is not None
    )
    tags = "".join(
        f'<span class="tag">{escape(str(sample[name]))}</span>'
        for name in (*kinds, "id")
        if sample.get(name) not in (None, "")
    )
    language = escape(str(sample.get("language") or "und"), quote=True)
    return (
        f'<article class="card sample">{_picture(sample, folder)}<div class="text" lang="{language}">'
        f'<div class="question">{escape(str(sample.get("question", "")))}</div>'
        f'<dl>{answers}</dl><div class="tags">{tags}</div></div></article>'
    )


def _picture(sample: Mapping[str, Any], folder: Path) -> str:
    name = sample.get("image")
    if not name:
        return ""
    path = folder / name
    if not path.is_file():
        return f'<p class="absent" style="padding:10px 12px">No file {escape(str(name))}.</p>'
    uri, (width, height) = _embed(path)
    kind = "crisp" if max(width, height) < _CRISP_BELOW else "smooth"
    boxes = "".join(_box(box, width=width) for box in sample.get("boxes") or ())
    return (
        f'<div class="picture"><svg role="img" viewBox="0 0 {width} {height}">'
        f"<title>{escape(str(sample.get('id', name)))}</title>"
        f'<image class="{kind}" width="{width}" height="{height}" href="{uri}"/>{boxes}</svg></div>'
    )


def _box(box: Mapping[str, Any], *, width: int) -> str:
    x0, y0, x1, y1 = box["corners"]
    size, label = width * 0.065, escape(str(box.get("label", "")))
    # A label begins at its box; one in the right half ends there, so that the picture's edge does not cut it.
    x, anchor = (x1, "end") if x0 + x1 > width else (x0, "start")
    return (
        f'<rect class="box" x="{x0:g}" y="{y0:g}" width="{x1 - x0:g}" height="{y1 - y0:g}"/>'
        f'<text class="box" x="{x:g}" y="{max(y0 - 0.25 * size, size):g}" font-size="{size:g}" '
        f'text-anchor="{anchor}" stroke-width="{size / 7:g}">{label}</text>'
    )


def _embed(path: Path) -> tuple[str, tuple[int, int]]:
    """A data URI of the picture, and its size before any reduction."""
    with Image.open(path) as image:
        size = image.size
        small = image.convert("RGB")
    kind = "png" if max(size) <= _MAX_SIDE and path.suffix.lower() == ".png" else "jpeg"
    small.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, format=kind, **({"quality": 88} if kind == "jpeg" else {"optimize": True}))
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f"data:image/{kind};base64,{data}", size
