"""Boxes in text, as DeepSeek-VL2 reads and writes them.

    <|ref|>the dog<|/ref|><|det|>[[12, 40, 503, 999], [520, 61, 880, 990]]<|/det|>

Corners are x0, y0, x1, y1 on a grid of 0..999 laid over the original picture, whatever was tiled. What a
model writes is read with regular expressions only; whatever does not fit is counted, never raised.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vl_jax.data.sample import Box
from vl_jax.data.text.tokenizer import SPECIAL

GRID = 999  # the largest coordinate

Corners = tuple[int, int, int, int]  # x0, y0, x1, y1
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Fonts with the characters that Pillow's own font lacks, by the names they have on common systems.
_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSerifCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "Hiragino Sans GB.ttc",
    "msyh.ttc",
    "simsun.ttc",
    "Arial Unicode.ttf",
)
_NO_CHARACTER = "\U0010ffff"  # no font has a glyph for it: it shows what a missing one looks like
_COLOURS = ("#c0392b", "#2471a3", "#1e8449", "#af601a", "#7d3c98")
_REF, _REF_END, _DET, _DET_END = "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>"
_MARKS = re.compile("(" + "|".join(re.escape(m) for m in (_REF, _REF_END, _DET, _DET_END)) + ")")
_NUMBER = r"\s*([0-9]{1,3})\s*"
_BOX = re.compile(r"\[" + ",".join([_NUMBER] * 4) + r"\]")
_DET_RUN = re.compile(re.escape(_DET) + ".*?" + re.escape(_DET_END), re.DOTALL)
# A list in which each box was replaced by one NUL.
_LIST = re.compile(r"\s*\[\s*(?:\0\s*(?:,\s*\0\s*)*)?\]\s*")


@dataclass(frozen=True)
class Region:
    """What one phrase refers to: any number of boxes on the grid of 0..999."""

    label: str
    boxes: tuple[Corners, ...]


@dataclass(frozen=True)
class Grounding:
    """What was found in a text; ``malformed`` counts the pieces that could not be read."""

    regions: tuple[Region, ...]
    malformed: int = 0

    def boxes(self, width: int, height: int) -> tuple[Box, ...]:
        """Every box with its label, in pixels of a picture of that size."""
        return tuple(
            Box(region.label, to_pixels(corners, width, height))
            for region in self.regions
            for corners in region.boxes
        )


@dataclass(frozen=True)
class Drawing:
    """A picture with boxes; where no font here can write a label, its number stands in its place."""

    picture: Image.Image
    legend: dict[str, str]  # such numbers, and the labels they stand for


def draw(picture: Image.Image, boxes: Sequence[Box], captions: Sequence[str] = ()) -> Drawing:
    """A copy of the picture with labelled boxes, one colour for each label.

    Args:
      captions: what is written at each box; none: its label. Where no font here can write the label, its
        number stands in its place.

    Labels that Pillow's own font cannot write, as Chinese ones, are written with a font of the system.
    """
    result = picture.convert("RGB")
    pen = ImageDraw.Draw(result)
    width, size = max(2, max(result.size) // 300), max(12, max(result.size) // 40)
    labels = list(dict.fromkeys(box.label for box in boxes))
    colours = dict(zip(labels, itertools.cycle(_COLOURS), strict=False))
    fonts = {label: _font(label, size) for label in labels}
    numbers = {label: str(i) for i, label in enumerate(labels, 1) if fonts[label] is None}
    for box, written in zip(boxes, captions or [box.label for box in boxes], strict=True):
        x0, y0, x1, y1 = box.corners
        pen.rectangle((x0, y0, x1, y1), outline=colours[box.label], width=width)
        corner, caption = (x0, max(y0 - 1.3 * size, 0)), _caption(written, box.label, numbers)
        font = fonts[box.label] or ImageFont.load_default(size)
        pen.rectangle(pen.textbbox(corner, caption, font), fill=colours[box.label])
        pen.text(corner, caption, "white", font)
    return Drawing(result, {number: label for label, number in numbers.items()})


def _caption(text: str, label: str, numbers: Mapping[str, str]) -> str:
    return text.replace(label, numbers[label]) if label in numbers else text


def _font(text: str, size: int) -> Font | None:
    """The first font here that has every character of a text."""
    own = ImageFont.load_default(size)
    return next((f for f in itertools.chain([own], _system_fonts(size)) if _has(f, text)), None)


def _system_fonts(size: int) -> Iterator[ImageFont.FreeTypeFont]:
    for name in _FONTS:
        try:
            yield ImageFont.truetype(name, size)
        except OSError:  # not on this system
            continue


def _has(font: Font, text: str) -> bool:
    def shape(character: str) -> tuple[tuple[int, int], bytes]:
        mask: Any = font.getmask(character)
        return mask.size, bytes(mask)

    missing = shape(_NO_CHARACTER)
    return all(shape(character) != missing for character in set(text) if not character.isspace())


def to_pixels(corners: Corners, width: int, height: int) -> Corners:
    """Corners on the grid to pixels: ``int(v / 999 * size)``."""
    x0, y0, x1, y1 = (int(v / GRID * size) for v, size in zip(corners, (width, height) * 2, strict=True))
    return x0, y0, x1, y1


def to_grid(corners: Sequence[float], width: int, height: int) -> Corners:
    """Corners in pixels to the nearest point of the grid; those outside the picture move to its edge."""
    x0, y0, x1, y1 = (
        min(max(round(v / size * GRID), 0), GRID)
        for v, size in zip(corners, (width, height) * 2, strict=True)
    )
    return x0, y0, x1, y1


def write(regions: Sequence[Region]) -> str:
    """The text of regions; ``parse`` reads it back.

    Raises:
      ValueError: a label holds a special mark, or a box does not lie on the grid.
    """
    pieces = []
    for region in regions:
        if any(mark in region.label for mark in SPECIAL):
            raise ValueError(f"label {region.label!r}: must not hold a special mark")
        for box in region.boxes:
            if not _on_grid(box):
                raise ValueError(f"box {box} of {region.label!r}: needs x0 <= x1, y0 <= y1 in 0..{GRID}")
        boxes = ", ".join(f"[{', '.join(map(str, box))}]" for box in region.boxes)
        pieces.append(f"{_REF}{region.label}{_REF_END}{_DET}[{boxes}]{_DET_END}")
    return "".join(pieces)


def write_boxes(boxes: Sequence[Box], *, width: int, height: int) -> str:
    """The text of boxes in pixels of a picture of that size; boxes of one label share a region.

    Raises:
      ValueError: as ``write``.
    """
    grouped: dict[str, list[Corners]] = {}
    for box in boxes:
        grouped.setdefault(box.label, []).append(to_grid(box.corners, width, height))
    return write([Region(label, tuple(corners)) for label, corners in grouped.items()])


def parse(text: str) -> Grounding:
    """Reads every region of a text (decoded with its special marks).

    Every box that can be read is kept, with the phrase right before its list (or an empty label). Counted
    as malformed are: a mark without its partner, a list that is not a list of boxes, and within a list
    each bracket that is not four integers in 0..999 with x0 <= x1 and y0 <= y1. A phrase without boxes, as
    in a question, is neither a region nor malformed.
    """
    regions, malformed, label = [], 0, ""
    for mark, content, closed in _pieces(text):
        malformed += not closed
        if mark == _REF and closed:
            label = content
        elif mark == _DET:
            boxes, wrong = _parse_list(content, whole=closed)
            malformed += wrong
            if boxes or not wrong:
                regions.append(Region(label, boxes))
        if mark != _REF:
            label = ""
    return Grounding(tuple(regions), malformed)


def rewrite(text: str, move: Callable[[Corners], Corners]) -> str:
    """The text with the corners of every box that can be read in it replaced; all else stays as it is."""

    def box(match: re.Match[str]) -> str:
        x0, y0, x1, y1 = map(int, match.groups())
        corners = iter(move((x0, y0, x1, y1)))
        return re.sub("[0-9]{1,3}", lambda _: str(next(corners)), match[0])

    return _DET_RUN.sub(lambda run: _BOX.sub(box, run[0]), text)


def _pieces(text: str) -> Iterator[tuple[str, str, bool]]:
    """(opening mark, what follows it, whether its partner closes it); other text has no mark.

    A closing mark that nothing opened comes as a piece of its own that is not closed.
    """
    first, *rest = _MARKS.split(text)
    marks, contents = rest[::2], rest[1::2]
    partner = {_REF: _REF_END, _DET: _DET_END}
    if first:
        yield "", first, True
    index = 0
    while index < len(marks):
        mark, content = marks[index], contents[index]
        closed = mark in partner and marks[index + 1 : index + 2] == [partner[mark]]
        yield mark, content, closed
        if closed:
            index += 1
            content = contents[index]
            if content.strip():
                yield "", content, True
        index += 1


def _parse_list(text: str, *, whole: bool) -> tuple[tuple[Corners, ...], int]:
    """The boxes of a list and how many of its pieces are wrong; of a cut list only its boxes are read."""
    boxes: list[Corners] = []
    wrong = 0

    def take(match: re.Match[str]) -> str:
        nonlocal wrong
        x0, y0, x1, y1 = map(int, match.groups())
        if _on_grid((x0, y0, x1, y1)):
            boxes.append((x0, y0, x1, y1))
        else:
            wrong += 1
        return "\0"

    rest = _BOX.sub(take, text.replace("\0", "?"))
    if whole and not _LIST.fullmatch(rest):
        # Each bracket left inside the list is one wrong box; failing that, the list itself is wrong.
        wrong += max(rest.count("[") - 1, 1)
    return tuple(boxes), wrong


def _on_grid(box: Corners) -> bool:
    x0, y0, x1, y1 = box
    return 0 <= x0 <= x1 <= GRID and 0 <= y0 <= y1 <= GRID
