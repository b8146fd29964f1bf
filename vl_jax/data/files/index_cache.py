"""Indices of files, kept in the user's cache folder: what takes long to make is made once, and mapped.

    checksum of all that follows (8 hexadecimal digits)
    {"files": [[path, bytes, time of change], ...], "arrays": {name: [dtype, length], ...}}
    the arrays, one behind the other, each from a multiple of 8 bytes on

An index is made anew if a file has changed or anything is wrong with it. Where it cannot be written it is
made every time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from vl_jax.data.files.shards import temporary_name
from vl_jax.runtime.cache_folder import cache_folder

Arrays = dict[str, np.ndarray]  # of integers, one dimension each
Done = Callable[[int], None]  # is told how many bytes of the files are dealt with

_log = logging.getLogger(__name__)
_WORTH = 1 << 16  # bytes; what is smaller is made in no time
_PATIENCE_S = 2.0  # before somebody who waits is told for what
_ALIGNED = 8
# How reading a file that is no index may end.
_HOSTILE = (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)


def keep(
    kind: str, files: Sequence[Path], make: Callable[[Done], Arrays], sound: Callable[[Arrays], bool]
) -> Arrays:
    """The index of some files, mapped if it was kept, else made and kept.

    Args:
      kind: what the index is, and the version of how it is made: another one is another index.
      make: makes it.
      sound: whether one that was kept can be relied on to point into the files; may raise what reading does.
    """
    states = [[str(f.resolve()), (state := f.stat()).st_size, state.st_mtime_ns] for f in files]
    place = _place(kind, files)
    found = _read(place, states, sound) if place else None
    if found is not None:
        return found
    with _watched(files, sum(size for _, size, _ in states)) as done:
        made = make(done)
    if place is None or sum(array.nbytes for array in made.values()) < _WORTH:
        return made
    try:
        _write(place, states, made)
    except OSError as error:
        _log.info("index of %s is not kept: %s", files[0], error)
        return made
    return _read(place, states, sound) or made  # Mapped, several processes have it in memory once.


def _place(kind: str, files: Sequence[Path]) -> Path | None:
    """What the index is called, whatever the state of its files; None if there is no cache folder."""
    name = hashlib.sha256("\0".join(str(file.resolve()) for file in files).encode()).hexdigest()[:24]
    try:
        return cache_folder("index") / f"{kind}-{name}"
    except RuntimeError:
        return None


def _write(place: Path, states: list[list[Any]], arrays: Arrays) -> None:
    """Writes an index that is either whole or not there, whoever else writes it."""
    shapes = {name: [array.dtype.str, len(array)] for name, array in arrays.items()}
    facts = json.dumps({"files": states, "arrays": shapes}).encode()
    # The first line has 8 digits, and both have an end.
    pieces = [facts + b" " * (-(len(facts) + 10) % _ALIGNED) + b"\n"]
    for array in arrays.values():
        pieces += [np.ascontiguousarray(array).data.cast("B"), b"\0" * (-array.nbytes % _ALIGNED)]
    checksum = 0
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(place)
    try:
        with temporary.open("wb") as out:
            out.writelines([b"%08x\n" % checksum, *pieces])
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


def _read(place: Path, states: list[list[Any]], sound: Callable[[Arrays], bool]) -> Arrays | None:
    """The arrays of an index, or None if there is none that is whole, sound and of these very files."""
    try:
        with place.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        end = data.find(b"\n", 9) + 1
        facts = json.loads(data[9:end])
        if facts["files"] != states or zlib.crc32(memoryview(data)[9:]) != int(data[:8], 16):
            return None
        arrays, start = {}, end
        for name, (dtype, length) in facts["arrays"].items():
            array = arrays[name] = np.frombuffer(data, np.dtype(dtype), length, start)
            start += array.nbytes + -array.nbytes % _ALIGNED
        numbers = all(array.dtype.kind in "iu" for array in arrays.values())
        return arrays if numbers and start == len(data) and sound(arrays) else None
    except _HOSTILE:
        return None


@contextmanager
def _watched(files: Sequence[Path], size: int) -> Iterator[Done]:
    """Shows how far an index is, and when it will be there, once that has taken a while."""
    several = f" and {len(files) - 1} more" if len(files) > 1 else ""
    label, begin = f"index of {files[0].name}{several}", time.monotonic()
    with ExitStack() as stack:
        bar: Progress | None = None

        def done(count: int) -> None:
            nonlocal bar
            if bar is None and (passed := time.monotonic() - begin) > _PATIENCE_S:
                console = Console(stderr=True)
                bar = Progress(console=console, transient=True, disable=not console.is_terminal)
                stack.enter_context(bar).add_task(label, total=size)
                if not console.is_terminal:
                    remaining = (size - count) * passed / max(count, 1)
                    _log.info("making the %s of %d MB, ETA %.0f s", label, size >> 20, remaining)
            if bar is not None:
                bar.update(bar.task_ids[0], completed=count)

        yield done
