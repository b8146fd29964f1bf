"""Keeps quiet about writes that end after another one has failed.

Where one file of a checkpoint cannot be written, orbax reports that and closes its event loop, while other
files are still being written. Each of them then fails to tell the loop that it is done, and Python prints a
traceback of it, which says nothing to whoever runs the training.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

logger = logging.getLogger(__name__)
_CLOSED = "Event loop is closed"


def hide() -> None:
    """From now on they are notes of level DEBUG; other errors that nobody can catch are shown as before."""
    shown = sys.unraisablehook
    if getattr(shown, "hides_late_writes", False):
        return

    def show(unraisable: Any) -> None:
        error = unraisable.exc_value
        if isinstance(error, RuntimeError) and str(error) == _CLOSED:
            logger.debug("a write ended after another one had failed")
        else:
            shown(unraisable)

    show.hides_late_writes = True
    sys.unraisablehook = show
