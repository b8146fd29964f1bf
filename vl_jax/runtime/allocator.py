"""How glibc manages the memory of a process that computes on a CPU.

A training step allocates and frees large buffers: page faults took a fifth of the quickstart's time. Huge
pages are decided on when a process starts, before jax is there; that it keeps what is freed, later.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLE = "GLIBC_TUNABLES"
_HUGE_PAGES = "glibc.malloc.hugetlb=1"
# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_HEAP = 4 << 30  # bytes of address space for huge pages; taken from memory when they are touched


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


def keep_freed_memory(*, one_heap: bool = False) -> None:
    """On a CPU, makes the allocator of glibc keep what is freed, in one heap of huge pages.

    XLA frees the temporaries of a step and takes them anew at the next one. By default they go back to the
    kernel in between, and a step of the quickstart costs 37,000 page faults (a sixth of its time). With an
    accelerator (but for ``one_heap``) or another C library nothing happens.

    Args:
      one_heap: for the threads of XLA as well, if it has not begun yet. A thread's own heap cannot keep a
        buffer of more than 64 MB; but what a process compiles makes a heap that all share slower (a step of
        the quickstart by a seventh).
    """
    import jax

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    if one_heap:
        libc.mallopt(_M_ARENA_MAX, 1)
    if jax.default_backend() != "cpu":  # which starts threads
        return
    for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
        libc.mallopt(parameter, value)
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    libc.free.restype, libc.free.argtypes = None, (ctypes.c_void_p,)
    block = libc.malloc(_HEAP)
    if block:
        page = mmap.PAGESIZE
        start = -(-block // page) * page
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(_HEAP - page), mmap.MADV_HUGEPAGE)
        libc.free(block)
