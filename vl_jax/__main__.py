"""``python -m vl_jax COMMAND`` is the console script ``vl_jax``."""

from __future__ import annotations

import os
import sys

_HUGE_PAGES = "glibc.malloc.hugetlb=1"


def _use_huge_pages() -> None:
    """Starts this process anew with memory in huge pages, which glibc only decides when a process starts.

    A training step on a CPU allocates and frees large buffers: page faults took a fifth of its time. The
    setting does nothing where there is no glibc or no huge page, and yields to one the user has made.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        environment = {**os.environ, "GLIBC_TUNABLES": _HUGE_PAGES}
        os.execve(sys.executable, sys.orig_argv, environment)


if __name__ == "__main__":
    _use_huge_pages()
    from vl_jax.cli import main

    sys.exit(main())
