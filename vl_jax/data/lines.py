"""Records of a large text file by number: only where each is is kept, and the file is mapped, not read.

So a file of millions of records costs no memory of the process, and no time of its garbage collector.
"""

from __future__ import annotations

import json
import mmap
import re
from pathlib import Path

import numpy as np

_CHUNK = 1 << 22
_BLANK = 8  # lines up to this many bytes are looked at when the file is opened
_MARK = b"\xef\xbb\xbf"  # the byte order mark
_SPACE = re.compile(r"[ \t\r\n]*")


class Spans:
    """Random access to stretches of a file; safe to read from many threads."""

    def __init__(self, data: mmap.mmap | bytes, starts: np.ndarray, stops: np.ndarray):
        """Takes the file and where each stretch begins and ends."""
        self._bytes, self._starts, self._stops = data, starts, stops

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:
        return self._bytes[self._starts[index] : self._stops[index]]


def lines(path: Path) -> Spans:
    """The lines that are not blank, without their ends.

    Raises:
      ValueError: there is no such file.
    """
    data = _map(path)
    ends = _line_ends(data)
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])[: len(ends)]
    if data[:3] == _MARK:
        starts[0] = 3
    kept = ends - starts > 0
    for i in np.flatnonzero(kept & (ends - starts <= _BLANK)):
        kept[i] = bool(data[starts[i] : ends[i]].strip())
    return Spans(data, starts[kept], ends[kept])


def json_items(path: Path) -> Spans:
    """The elements of the list that a JSON file holds.

    Raises:
      ValueError: there is no such file, or it is not a JSON list in UTF-8; with the position.
    """
    data = _map(path)
    try:
        text = str(data, "utf-8-sig")
        places = _elements(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from None
    # Characters to bytes: what lies before a place, encoded.
    marks = [0, *(mark for place in places for mark in place)]
    lengths = [len(text[a:b].encode()) for a, b in zip(marks, marks[1:], strict=False)]
    offsets = np.cumsum(lengths, dtype=np.int64) + (3 if data[:3] == _MARK else 0)
    return Spans(data, offsets[::2], offsets[1::2])


def _map(path: Path) -> mmap.mmap | bytes:
    if not path.is_file():
        raise ValueError(f"no such file {path}")
    if not path.stat().st_size:  # An empty file cannot be mapped.
        return b""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _line_ends(data: mmap.mmap | bytes) -> np.ndarray:
    size, found = len(data), []
    for start in range(0, size, _CHUNK):
        chunk = np.frombuffer(data, np.uint8, min(_CHUNK, size - start), start)
        found.append(start + np.flatnonzero(chunk == ord("\n")))
    if size and data[size - 1 : size] != b"\n":
        found.append(np.array([size]))
    return np.concatenate([np.zeros(0, np.int64), *found]).astype(np.int64)


def _elements(text: str) -> list[tuple[int, int]]:
    """Where each element of a JSON list begins and ends; they are decoded one by one, and none is kept."""
    place, decode = _next(text, 0), json.JSONDecoder().raw_decode
    if not text.startswith("[", place):
        raise TypeError(f"expected a list of records, found {type(json.loads(text)).__name__}")
    result: list[tuple[int, int]] = []
    place = _next(text, place + 1)
    while result or not text.startswith("]", place):
        _, stop = decode(text, place)
        result.append((place, stop))
        place = _next(text, stop)
        if text.startswith("]", place):
            break
        if not text.startswith(",", place):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
        place = _next(text, place + 1)
    if (rest := _next(text, place + 1)) < len(text):
        raise json.JSONDecodeError("Extra data", text, rest)
    return result


def _next(text: str, place: int) -> int:
    """The first place from there on that is not blank."""
    found = _SPACE.match(text, place)
    return found.end() if found else place
