"""What a process sets up once, before it computes: logging, processes of a pod, compilation cache, memory."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from pathlib import Path

import jax

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_HEAP = 4 << 30  # bytes of address space for huge pages; taken from memory when they are touched


def set_up() -> None:
    """Logging, the other processes of a pod, and a compilation cache: a second run starts in seconds."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("vl_jax").setLevel(logging.INFO)
    if os.environ.get("VL_JAX_DISTRIBUTED"):  # set by the launchers in tpu_scripts
        jax.distributed.initialize()
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vl_jax" / "xla"
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(default))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def keep_freed_memory() -> None:
    """On a CPU, makes the allocator of glibc keep what is freed, in one heap of huge pages.

    XLA frees the temporaries of a step and takes them anew at the next one. By default they go back to the
    kernel in between, and a step of the quickstart costs 37,000 page faults (a sixth of its time). With an
    accelerator or another C library nothing happens.
    """
    libc = ctypes.CDLL(None)
    if jax.default_backend() != "cpu" or not hasattr(libc, "mallopt"):
        return
    for parameter, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1)):
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
