"""Phrases of a text and what they name in a picture: a label that lies in both.

text     a red circle at the top left, a blue star on the right.
         [----------]                  [---------]              characters, then tokens
picture  [x0 y0 x1 y1]                 [x0 y0 x1 y1]            pixels of the picture, then of the tile
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vl_jax.data.images.spatial import Corners, Cut, clipped


@dataclass(frozen=True)
class Phrase:
    """What a part of the text names."""

    text: str
    span: tuple[int, int]  # from, to: characters of what was written, or tokens of the row
    corners: Corners


@dataclass(frozen=True)
class Phrases:
    """The phrases of a sample's text that name something in its picture; a ``SpatialLabel``."""

    phrases: tuple[Phrase, ...]
    size: tuple[int, int]  # width and height of the picture

    def cut(self, cut: Cut, min_visible: float = 0.0) -> Phrases:
        """Those whose things are shown, clipped to it."""
        moved = ((phrase, clipped(cut, phrase.corners, min_visible)) for phrase in self.phrases)
        kept = tuple(dataclasses.replace(phrase, corners=corners) for phrase, corners in moved if corners)
        return Phrases(kept, cut.size)

    def in_tokens(self, places: Sequence[int], length: int, *, first: int, room: int) -> Phrases:
        """The same with spans of tokens; what was cut off of the text has none.

        Args:
          places: the character with which each token begins.
          length: characters of the text.
          first: the place of the text's first token in the row.
          room: tokens of the text that are kept.
        """
        ends = [*places[1:], length]
        kept = []
        for phrase in self.phrases:
            start, stop = phrase.span
            inside = [i for i, (a, b) in enumerate(zip(places, ends, strict=True)) if a < stop and b > start]
            if inside and inside[-1] < room:
                span = first + inside[0], first + inside[-1] + 1
                kept.append(dataclasses.replace(phrase, span=span))
        return dataclasses.replace(self, phrases=tuple(kept))


def has_phrases(labels: Mapping[str, Any]) -> bool:
    """Whether any of the labels lies in the text."""
    return any(isinstance(label, Phrases) for label in labels.values())
