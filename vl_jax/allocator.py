"""How glibc manages the memory of a process, which it decides when the process starts.

A training step on a CPU allocates and frees large buffers. By default they go back to the kernel in between,
and every thread has a heap of its own: page faults took a fifth of the quickstart's time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_VARIABLE = "GLIBC_TUNABLES"
_HUGE_PAGES = "glibc.malloc.hugetlb=1"
# One heap for all threads, out of which nothing is taken and given back. Hosts of accelerators have many
# threads that load data, which would wait for one another.
_ONE_HEAP = ":glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000"
_ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*")  # in /dev


def start_anew() -> None:
    """Starts this process again with these settings; they yield to those the user has made.

    Without glibc, or huge pages, they do nothing.
    """
    if sys.platform == "linux" and _VARIABLE not in os.environ:
        settings = _HUGE_PAGES if _has_accelerator() else _HUGE_PAGES + _ONE_HEAP
        os.execve(sys.executable, sys.orig_argv, {**os.environ, _VARIABLE: settings})


@contextmanager
def as_found() -> Iterator[None]:
    """Programs that start within are given no settings of ours, as other people's would not be."""
    ours = os.environ.get(_VARIABLE, "")
    if not ours.startswith(_HUGE_PAGES):
        yield
        return
    del os.environ[_VARIABLE]
    try:
        yield
    finally:
        os.environ[_VARIABLE] = ours


def _has_accelerator() -> bool:
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return any(next(Path("/dev").glob(pattern), None) for pattern in _ACCELERATORS)
