"""Lines of a large text file by number: only where each begins is kept, and the file is mapped, not read."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

_CHUNK = 1 << 26
_BLANK = 8  # lines up to this many bytes are looked at when the file is opened


class Lines:
    """Random access to the lines that are not blank; safe to read from many threads."""

    def __init__(self, path: Path):
        """Opens the file and finds its lines.

        Raises:
          ValueError: there is no such file.
        """
        if not path.is_file():
            raise ValueError(f"no such file {path}")
        self._bytes: mmap.mmap | bytes = b""
        if path.stat().st_size:  # An empty file cannot be mapped.
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        ends = self._ends()
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])[: len(ends)]
        if self._bytes[:3] == b"\xef\xbb\xbf":  # a byte order mark
            starts[0] = 3
        kept = ends - starts > 0
        for i in np.flatnonzero(kept & (ends - starts <= _BLANK)):
            kept[i] = bool(self._bytes[starts[i] : ends[i]].strip())
        self._starts, self._ends_kept = starts[kept], ends[kept]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:
        """One line without its end."""
        return self._bytes[self._starts[index] : self._ends_kept[index]]

    def _ends(self) -> np.ndarray:
        size, found = len(self._bytes), []
        for start in range(0, size, _CHUNK):
            chunk = np.frombuffer(self._bytes[start : start + _CHUNK], np.uint8)
            found.append(start + np.flatnonzero(chunk == ord("\n")))
        if size and self._bytes[size - 1 : size] != b"\n":
            found.append(np.array([size]))
        return np.concatenate([np.zeros(0, np.int64), *found]).astype(np.int64)
