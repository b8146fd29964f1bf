"""The files of a source: which they are, and in which of several a record is."""

from __future__ import annotations

import os
import platform
import threading
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from vl_jax.data.sample import DEFAULT_MAX_PIXELS
from vl_jax.runtime.storage import buckets


def check_fields(
    name: str, file: str, endings: tuple[str, ...], max_pixels: int = DEFAULT_MAX_PIXELS
) -> None:
    """The rules that configs of sources share.

    Raises:
      ValueError: which field breaks which rule.
    """
    if not name:
        raise ValueError("name='' of a source: must not be empty")
    if not file.endswith(endings):
        raise ValueError(f"file={file!r} of source {name!r}: must end in {' or '.join(endings)}")
    if max_pixels < 1:
        raise ValueError(f"max_pixels={max_pixels} of source {name!r}: must be at least 1")


def file_and_folder(root: str, file: str, folder: str, name: str) -> tuple[Path, Path]:
    """The file of records, and the (resolved) folder of the images they name: by default that of the file.

    Raises:
      ValueError: there is no such file.
    """
    base = buckets.root_of(root)
    place = base / file
    if buckets.is_bucket(root):
        buckets.matching(root, file)
    if not place.is_file():
        raise ValueError(f"source {name!r}: no such file {place}; {_from_where(root)}")
    return place, (base / folder if folder else place.parent).resolve()


def find_files(root: str, pattern: str, name: str) -> list[Path]:
    """The files that a name or a pattern such as ``shards/*.tar`` means, in the order of their names.

    Raises:
      ValueError: there is none.
    """
    whole = Path(root) / pattern
    if buckets.is_bucket(root):
        found = buckets.matching(root, pattern)
    elif any(mark in pattern for mark in "*?["):
        base = Path(whole.anchor) if whole.is_absolute() else Path(root)
        found = sorted(f for f in base.glob(str(whole.relative_to(base))) if f.is_file())
    else:
        found = [whole] if whole.is_file() else []
    if not found:
        raise ValueError(f"source {name!r}: no such file {whole}; {_from_where(root)}")
    return found


def _from_where(root: str) -> str:
    return f"files of sources are looked for from data.root={root!r} on: set --config.data.root=FOLDER"


def temporary_name(file: Path) -> Path:
    """What a file is called until it is whole; no other thread uses the name, on whatever host."""
    return file.with_name(f"{file.name}.{platform.node()}.{os.getpid()}.{threading.get_ident()}.tmp")


class Places:
    """Numbers the records of several files through."""

    def __init__(self, counts: Sequence[int]):
        """Takes the number of records of each file."""
        self._ends = list(accumulate(counts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Which file, and which record of it.

        Raises:
          IndexError: there are not so many.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        file = bisect_right(self._ends, index)
        return file, index - (self._ends[file - 1] if file else 0)
