"""How glibc manages the memory of a process, which it decides when the process starts.

A training step on a CPU allocates and frees large buffers: page faults took a fifth of the quickstart's time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLE = "GLIBC_TUNABLES"
_HUGE_PAGES = "glibc.malloc.hugetlb=1"


def start_anew() -> None:
    """Starts this process again with memory in huge pages; yields to settings that the user has made.

    It does nothing where there is no glibc, or no huge page.
    """
    if sys.platform == "linux" and _VARIABLE not in os.environ:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, _VARIABLE: _HUGE_PAGES})


@contextmanager
def as_found() -> Iterator[None]:
    """Programs that start within are given no settings of ours, as other people's would not be."""
    ours = os.environ.get(_VARIABLE, "")
    if ours != _HUGE_PAGES:
        yield
        return
    del os.environ[_VARIABLE]
    try:
        yield
    finally:
        os.environ[_VARIABLE] = ours
