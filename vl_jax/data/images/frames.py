"""Boxes and the picture they are on, in one frame, whichever frame their record declares.

    record    width x height, boxes in it            picture file    stored and shown (see ``picture``)
                 '--which of the two has this size?--> scale, turn--> boxes on the picture as it is read

Where both frames have the size, or none is declared, boxes are on the picture as it is shown: that is what
the people see who draw them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vl_jax.data.picture import Corners, PictureFrame, Size, turn_corners, turn_size, undo
from vl_jax.data.sample import BadSample, Image, Note, image_size


@dataclass(frozen=True)
class DeclaredFrame:
    """The size that boxes were written for, and the way from there to the picture as it is read."""

    declared: Size
    fitting: Size  # of the picture's frame that it stands for; another size of the same shape is scaled
    turn: int = 1  # the orientation that leads to the picture as it is read

    @property
    def size(self) -> Size:
        """Width and height of the picture as it is read."""
        return turn_size(self.fitting, self.turn)

    def notes(self, where: str) -> tuple[Note, ...]:
        """What is odd about it, if anything is."""
        if self.declared == self.fitting:
            return ()
        (width, height), (across, down) = self.declared, self.fitting
        message = f"{where}: boxes in {width}x{height} on a picture of {across}x{down} are scaled"
        return (Note("scaled_boxes", message),)

    def place(self, corners: Corners) -> Corners:
        """A rectangle on the picture as it is read."""
        if self.declared != self.fitting:
            across, down = (to / of for to, of in zip(self.fitting, self.declared, strict=True))
            x0, y0, x1, y1 = corners
            corners = (x0 * across, y0 * down, x1 * across, y1 * down)
        return turn_corners(corners, self.turn, self.fitting)


def frames_of(images: Sequence[Image]) -> list[PictureFrame]:
    """The frames of those images that can be opened: of the others, opening them says what is wrong."""
    found = []
    for image in images:
        frame = getattr(image, "frame", None)  # only files have two
        try:
            found.append(PictureFrame(image_size(image)) if frame is None else frame())
        except BadSample:
            continue
    return found


def declared_frame(declared: Size | None, frames: Sequence[PictureFrame], where: str) -> DeclaredFrame:
    """What a declared size stands for: of several pictures, the first that it fits.

    Args:
      declared: width and height; None, if nobody declares them, is the first picture as it is shown.
      frames: of the pictures; without any, boxes stay as they are.

    Raises:
      BadSample: the size fits no picture, or there is neither.
    """
    if not frames:
        if declared is None:
            raise BadSample("bad_box", f"{where}: boxes without a picture, nor a width and height")
        return DeclaredFrame(declared, declared)
    if declared is None:
        declared = frames[0].shown
    for fits in (_is_equal, _is_same_shape):
        for frame in frames:
            if fits(declared, frame.shown):
                return DeclaredFrame(declared, frame.shown, 1 if frame.read == "shown" else undo(frame.turn))
            if fits(declared, frame.stored):
                return DeclaredFrame(declared, frame.stored, frame.turn if frame.read == "shown" else 1)
    sizes = ", ".join(f"{frame.shown[0]}x{frame.shown[1]}" for frame in frames)
    message = (
        f"{where}: boxes in {declared[0]}x{declared[1]}, which is not the shape of the picture ({sizes})"
    )
    raise BadSample("wrong_size", f"{message}; width and height must be those the boxes were drawn in")


def _is_equal(declared: Size, size: Size) -> bool:
    return declared == size


def _is_same_shape(declared: Size, size: Size) -> bool:
    """Whether one is the other made larger or smaller, within a pixel."""
    return abs(declared[0] * size[1] - declared[1] * size[0]) < max(*declared, *size)
