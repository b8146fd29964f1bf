"""Drawing what an answer names on the picture that was asked about."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vl_jax.data.picture import Orientation
else:
    Orientation = Any  # a command says what it can do without loading what does it


def draw_boxes(text: str, image: Path, target: Path, orientation: Orientation = "shown") -> None:
    """Writes the image, as the model saw it, with the boxes of an answer, and says how many there are."""
    from vl_jax.data.sample import FileImage
    from vl_jax.data.text import grounding

    picture = FileImage(image, where="--image", orientation=orientation)()
    found = grounding.parse(text)
    boxes = found.boxes(*picture.size)
    drawing = grounding.draw(picture, boxes)
    drawing.picture.save(target)
    print(f"{target}: boxes drawn: {len(boxes)}, not readable: {found.malformed}", file=sys.stderr)
    for number, label in drawing.legend.items():
        print(f"{target}: {number} stands for {label!r}, which no font here can write", file=sys.stderr)
