"""Values of a large JSON file one after the other: only some megabytes of it are text at a time."""

from __future__ import annotations

import codecs
import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_WINDOW = 1 << 22  # bytes of text; several characters at least
_CUT = len("e+")  # characters by which a number seems to end before the window, though it goes on behind it
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")


class Value(NamedTuple):
    """A value, and the bytes of the file where it begins and stops."""

    value: Any
    start: int
    stop: int


class JsonReader:
    """Goes through the text of a file; all methods raise ValueError, with the position, where it is not JSON.

    reader = JsonReader(path, data)
    for key in reader.fields():  # of an object
        for item, start, stop in reader.items():  # of a list in it
    reader.end()
    """

    def __init__(self, path: Path, data: mmap.mmap | bytes):
        """Takes a file's name, for messages, and what is in it."""
        self._path, self._data = path, data
        self._text, self._place = "", 0  # the window, and how far it is read
        self._read = 3 if data[:3] == BYTE_ORDER_MARK else 0  # bytes up to the end of the window
        self._known = (0, self._read)  # a place of the window, and which byte of the file that is
        self._plain = True  # every character of the window is a byte

    @property
    def position(self) -> int:
        """The byte of the file that is read next."""
        return self._byte(self._place)

    def peek(self) -> str:
        """The next character that is not blank, which stays to be read; empty at the end."""
        while True:
            found = _SPACE.match(self._text, self._place)
            self._place = found.end() if found else self._place
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def value(self) -> Value:
        """Reads a whole value."""
        self.peek()
        while True:
            try:
                value, stop = _decode(self._text, self._place)
            except json.JSONDecodeError as error:
                if not self._more():  # It might have been cut off by the end of the window.
                    raise self._error(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self._error(str(error), self._place) from None
            else:
                if stop + _CUT < len(self._text) or not self._more():
                    break
        start, self._place = self._byte(self._place), stop
        return Value(value, start, self._byte(stop))

    def items(self) -> Iterator[Value]:
        """Reads the elements of a list."""
        self._take("[")
        if not self._taken("]"):
            yield self.value()
            while not self._taken("]"):
                self._take(",")
                yield self.value()

    def fields(self) -> Iterator[str]:
        """Reads the keys of an object; who asks for the next one has read this one's value."""
        self._take("{")
        if not self._taken("}"):
            yield self._key()
            while not self._taken("}"):
                self._take(",")
                yield self._key()

    def end(self) -> None:
        """Makes sure that nothing follows."""
        if self.peek():
            raise self._error("Extra data", self._place)

    def _key(self) -> str:
        if self.peek() != '"':
            raise self._error("Expecting property name enclosed in double quotes", self._place)
        key = self.value().value
        self._take(":")
        return key

    def _taken(self, mark: str) -> bool:
        """Whether that is the next character; then it is read."""
        found = self.peek() == mark
        self._place += found
        return found

    def _take(self, mark: str) -> None:
        if not self._taken(mark):
            raise self._error(f"Expecting {mark!r} delimiter", self._place)

    def _more(self) -> bool:
        """Moves the window to the place and makes it larger; False at the end of the file."""
        if self._read == len(self._data):
            return False
        start = self.position
        size = max(_WINDOW, 2 * (self._read - start))
        raw = self._data[start : start + size]
        try:
            self._text, length = codecs.utf_8_decode(raw, "strict", start + size >= len(self._data))
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._path}: not UTF-8 at byte {start + error.start}") from None
        self._place, self._known, self._read = 0, (0, start), start + length
        self._plain = length == len(self._text)
        return True

    def _byte(self, place: int) -> int:
        """Which byte of the file a place of the window is; places only grow."""
        known, byte = self._known
        length = place - known if self._plain else len(self._text[known:place].encode())
        self._known = (place, byte + length)
        return byte + length

    def _error(self, problem: str, place: int) -> ValueError:
        before = self._data[: self._byte(place)].removeprefix(BYTE_ORDER_MARK)
        line = before.count(b"\n") + 1
        column = len(before[before.rfind(b"\n") + 1 :].decode(errors="replace")) + 1
        return ValueError(f"{self._path}: not JSON: {problem}: line {line} column {column}")


_decode = json.JSONDecoder().raw_decode
