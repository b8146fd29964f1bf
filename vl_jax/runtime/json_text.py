"""JSON that somebody else wrote, read with bounds: a small file can stand for very many objects in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST = 100_000_000  # bytes that a text takes in memory; a vocabulary may take more
MOST_MARKS = 3_000_000  # brackets, commas and colons; a value takes some hundred bytes in memory

Pairs = list[tuple[str, Any]]


def parse(
    raw: bytes,
    *,
    longest: int = LONGEST,
    most_marks: int = MOST_MARKS,
    hook: Callable[[Pairs], Any] | None = None,
) -> Any:
    """The value of a text in UTF-8, with or without a mark of the order of bytes.

    Args:
      hook: makes a value of the names and values of each object, as that of ``json.loads``.

    Raises:
      ValueError: the text is no JSON, or takes more bytes, marks or levels than it may.
    """
    _check_length(len(raw) if raw.isascii() else 4 * len(raw), longest)
    marks = sum(raw.count(mark) for mark in b"[{,:")
    if marks > most_marks:
        raise ValueError(f"has {marks} brackets, commas and colons, at most {most_marks} are allowed")
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=hook)
    except RecursionError:
        raise ValueError("not JSON that can be read: it is nested too deeply") from None


def read(path: Path, *, longest: int = LONGEST, most_marks: int = MOST_MARKS) -> Any:
    """The value of a file; see ``parse``.

    Raises:
      ValueError: as ``parse`` does.
      OSError: the file cannot be read.
    """
    _check_length(path.stat().st_size, longest)
    return parse(path.read_bytes(), longest=longest, most_marks=most_marks)


def _check_length(length: int, longest: int) -> None:
    if length > longest:
        raise ValueError(f"takes {length} bytes, at most {longest} are allowed")
