"""Opened picture files as RGB pictures, in one frame: which way up the pixels, the size and the boxes are.

    stored pixels --the orientation that EXIF (or XMP) states, 1..8--> the picture as it is shown

A camera stores its sensor's rows and states how to turn them. Browsers and labelling tools show the turned
picture. Many published processors read the stored pixels. TIFF is always shown, since Pillow turns it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image as PilImage

from vl_jax.data.levels import is_deep, to_grey

Orientation = Literal["shown", "stored"]
Size = tuple[int, int]  # width, height in pixels
Corners = tuple[float, float, float, float]  # x0, y0, x1, y1

_TAG = 0x112  # of the orientation, in EXIF and in TIFF
_METHODS = {
    2: PilImage.Transpose.FLIP_LEFT_RIGHT,
    3: PilImage.Transpose.ROTATE_180,
    4: PilImage.Transpose.FLIP_TOP_BOTTOM,
    5: PilImage.Transpose.TRANSPOSE,
    6: PilImage.Transpose.ROTATE_270,  # Pillow counts against the clock
    7: PilImage.Transpose.TRANSVERSE,
    8: PilImage.Transpose.ROTATE_90,
}
_SWAPPED = 5  # from this orientation on, width becomes height
# What Pillow keeps of a file that may state an orientation.
_STATEMENTS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
_LATE = (b"Raw profile type exif", b"XML:com.adobe.xmp")
_MOST_CHUNKS = 1 << 16  # of a PNG file


@dataclass(frozen=True)
class PictureFrame:
    """The two frames of a picture, and the one that its pixels are read in."""

    stored: Size
    turn: int = 1  # the orientation as EXIF numbers it; 1: both frames are the same
    read: Orientation = "shown"

    @property
    def shown(self) -> Size:
        """Width and height as browsers show it."""
        return turn_size(self.stored, self.turn)

    @property
    def size(self) -> Size:
        """Width and height as it is read."""
        return self.shown if self.read == "shown" else self.stored


def read_frame(picture: PilImage.Image, orientation: Orientation) -> PictureFrame:
    """The frames of a picture that was opened, before any pixel of it is decoded."""
    tags = getattr(picture, "tag_v2", None)
    if tags is not None:
        turn = _known(tags.get(_TAG))
        return PictureFrame(turn_size(picture.size, turn), turn)  # Pillow has turned its size already
    if picture.format == "PNG" and _says_more_behind_pixels(picture):
        picture.load()
    return PictureFrame(picture.size, _turn(picture), orientation)


def decode(picture: PilImage.Image, orientation: Orientation) -> PilImage.Image:
    """An RGB copy of a picture that was opened, in the frame asked for; see ``to_rgb``."""
    result = to_rgb(picture)
    turn = 1 if orientation == "stored" or hasattr(picture, "tag_v2") else _turn(picture)
    result = turned(result, turn)
    for name in _STATEMENTS:  # else the copy, once it is saved, would be turned again
        result.info.pop(name, None)
    return result


def decode_reduced(
    picture: PilImage.Image, orientation: Orientation, width: int, height: int
) -> PilImage.Image:
    """As ``decode``; but a JPEG comes at 1/2, 1/4 or 1/8 of its size if that is no smaller than asked for."""
    if picture.format in ("JPEG", "MPO"):
        swapped = orientation == "shown" and _turn(picture) >= _SWAPPED
        picture.draft("RGB", (height, width) if swapped else (width, height))
    return decode(picture, orientation)


def to_rgb(picture: PilImage.Image) -> PilImage.Image:
    """An RGB copy; white shows through what is transparent, and more than 8 bits are scaled.

    Raises:
      LevelsError: the picture has more than 8 bits a channel, and nothing says what is black and white.
    """
    if is_deep(picture):
        return to_grey(picture).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = PilImage.new("RGBA", layer.size, (255, 255, 255, 255))
        return PilImage.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")


def turned(picture: PilImage.Image, turn: int) -> PilImage.Image:
    """A picture as an orientation, as EXIF numbers it, turns it."""
    return picture if turn == 1 else picture.transpose(_METHODS[turn])


def turn_size(size: Size, turn: int) -> Size:
    """Width and height of a picture of that size once it is turned."""
    width, height = size
    return (height, width) if turn >= _SWAPPED else (width, height)


def turn_corners(corners: Corners, turn: int, size: Size) -> Corners:
    """Where a rectangle goes when a picture of that size is turned as an orientation says."""
    (x0, y0, x1, y1), (width, height) = corners, size
    if turn >= _SWAPPED:
        x0, y0, x1, y1, width, height = y0, x0, y1, x1, height, width
    if turn in (2, 3, 6, 7):
        x0, x1 = width - x1, width - x0
    if turn in (3, 4, 7, 8):
        y0, y1 = height - y1, height - y0
    return x0, y0, x1, y1


def undo(turn: int) -> int:
    """The orientation that leads back."""
    return {6: 8, 8: 6}.get(turn, turn)


def _turn(picture: PilImage.Image) -> int:
    """The orientation that is stated, as far as the file was read."""
    try:
        # The method of the class: that of PNG files would decode them first.
        return _known(PilImage.Image.getexif(picture).get(_TAG))
    except Exception:  # Broken EXIF ends in almost any way, and states nothing: viewers ignore it too.
        return 1


def _known(stated: Any) -> int:
    return stated if isinstance(stated, int) and stated in _METHODS else 1


def _says_more_behind_pixels(picture: PilImage.Image) -> bool:
    """Whether a PNG file has EXIF or XMP behind its pixels, where Pillow has not looked yet."""
    file: Any = getattr(picture, "fp", None)
    if file is None:  # all of it was read
        return False
    place, behind = file.tell(), False
    try:
        file.seek(8)
        for _ in range(_MOST_CHUNKS):
            head = file.read(8)
            if len(head) < 8:
                return False
            length, kind = struct.unpack(">I4s", head)
            behind |= kind == b"IDAT"
            start = file.tell()
            if behind and kind == b"eXIf":
                return True
            if behind and kind in (b"zTXt", b"iTXt", b"tEXt") and file.read(24).startswith(_LATE):
                return True
            file.seek(start + length + 4)
        return False
    finally:
        file.seek(place)
