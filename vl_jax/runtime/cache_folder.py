"""Where a user's machine keeps what can be made anew: compiled programs, and indices of data."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder for things of a kind; it need not exist.

    Raises:
      RuntimeError: the user has no home.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "vl_jax" / name
