"""Records of a large text file by number: only where each is is kept, and the file is mapped, not read.

So a file of millions of records costs no memory of the process, and no time of its garbage collector.
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vl_jax.data.files.encoding import check_encoding
from vl_jax.data.files.index_cache import Arrays, Done, keep
from vl_jax.data.files.json_reader import BYTE_ORDER_MARK, JsonReader

_CHUNK = 1 << 22
_BLANK = 8  # lines up to this many bytes are looked at when the file is opened
_SHOWN = 1 << 10  # half the elements between two signs of progress


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
    data = map_file(path)
    ends = _line_ends(data)
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])[: len(ends)]
    if data[:3] == BYTE_ORDER_MARK:
        starts[0] = 3
    kept = ends - starts > 0
    for i in np.flatnonzero(kept & (ends - starts <= _BLANK)):
        kept[i] = bool(data[starts[i] : ends[i]].strip())
    return Spans(data, starts[kept], ends[kept])


def json_items(path: Path) -> Spans:
    """The elements of the list that a JSON file holds; where they are is kept for the next time.

    Raises:
      ValueError: there is no such file, or it is not a JSON list in UTF-8; with the position.
    """
    data = map_file(path)

    def make(done: Done) -> Arrays:
        reader = JsonReader(path, data)
        if reader.peek() != "[":
            value = reader.value().value
            try:
                reader.end()
            except ValueError as error:
                rule = "a file with one record a line is named .jsonl"
                raise ValueError(f"{error}: {rule}" if isinstance(value, dict) else str(error)) from None
            found = type(value).__name__
            if isinstance(value, dict):
                keys = [repr(key[:40]) for key in value][:8]
                found += f" with the keys {', '.join(keys) or 'none'}{', ...' if len(value) > 8 else ''}"
            raise ValueError(f"{path}: expected a list of records, found {found}")
        places = read_places(reader, done)
        reader.end()
        return {"starts": places[::2], "stops": places[1::2]}

    kept = keep("json-1", [path], make, lambda arrays: spans_lie_in(len(data), **arrays))
    return Spans(data, **kept)


def read_places(
    reader: JsonReader, done: Done, look: Callable[[Any], object] = lambda value: None
) -> np.ndarray:
    """Where the elements of a list begin and stop, by turns: i64[2n].

    Args:
      look: is shown each of them.
    """
    places = array("q")
    for value, start, stop in reader.items():
        look(value)
        places.append(start)
        places.append(stop)
        if not len(places) % _SHOWN:
            done(stop)
    return np.array(places, np.int64)


def spans_lie_in(size: int, starts: np.ndarray, stops: np.ndarray) -> bool:
    """Whether these are stretches of a file of that many bytes."""
    return len(starts) == len(stops) and bool(((0 <= starts) & (starts <= stops) & (stops <= size)).all())


def map_file(path: Path) -> mmap.mmap | bytes:
    """What is in a file, mapped.

    Raises:
      ValueError: there is no such file, or it is a text that is not UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"no such file {path}")
    if not path.stat().st_size:  # An empty file cannot be mapped.
        return b""
    with path.open("rb") as file:
        check_encoding(path, os.pread(file.fileno(), 4, 0))
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _line_ends(data: mmap.mmap | bytes) -> np.ndarray:
    size, found = len(data), []
    for start in range(0, size, _CHUNK):
        chunk = np.frombuffer(data, np.uint8, min(_CHUNK, size - start), start)
        found.append(start + np.flatnonzero(chunk == ord("\n")))
    if size and data[size - 1 : size] != b"\n":
        found.append(np.array([size]))
    return np.concatenate([np.zeros(0, np.int64), *found]).astype(np.int64)
