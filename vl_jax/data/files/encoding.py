"""Bytes of a text file as text: UTF-8, or what a byte-order mark says."""

from __future__ import annotations

import codecs
from pathlib import Path

# The longer marks first: that of UTF-32 begins like that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def marked_encoding(data: bytes) -> tuple[str, int]:
    """The encoding that the beginning of a file tells, and how long its mark is; UTF-8 without one."""
    return next(((name, len(mark)) for mark, name in _MARKS if data.startswith(mark)), ("utf-8", 0))


def to_text(data: bytes) -> str:
    """The text, without its mark.

    Raises:
      ValueError: it is no text of that encoding; with the encoding and the position.
    """
    name, start = marked_encoding(data)
    try:
        return data[start:].decode(name)
    except UnicodeDecodeError as error:
        raise ValueError(f"not {name.upper()} at byte {start + error.start}: save it as UTF-8") from None


def check_encoding(file: Path, beginning: bytes) -> None:
    """Makes sure that a file does not say of itself that it is anything but UTF-8.

    Raises:
      ValueError: it does.
    """
    name, _ = marked_encoding(beginning)
    if name != "utf-8":
        raise ValueError(f"{file}: a text in {name.upper()}: save it as UTF-8")
