"""What a host of several writes: to its screen as ever, and to a file of its own in the folder of the run.

What libraries print beneath Python, such as the stacks of a process that jax ends, goes to the file alone.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TextIO

_file: TextIO | None = None
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def begin(logs: Path, number: int) -> None:
    """From now on this process writes to a file of its number too; if that cannot be, it goes on without."""
    global _file
    if _file is not None:
        return
    try:
        logs.mkdir(parents=True, exist_ok=True)
        _file = (logs / f"{number}.log").open("a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        logging.getLogger(__name__).warning("this host has no log file: %s", error)
        return
    handler = logging.StreamHandler(_file)
    handler.setFormatter(logging.Formatter(_FORMAT))
    root, old = logging.getLogger(), sys.stderr
    root.addHandler(handler)
    screen = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    for handler in root.handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is old:
            handler.setStream(screen)
    os.dup2(_file.fileno(), 2)
    sys.stderr = screen


def say(line: str) -> None:
    """Prints the last line of this process, and writes it to the file."""
    print(line, file=sys.stderr, flush=True)
    write(line)


def write(text: str) -> None:
    """Writes to the file alone, if there is one."""
    if _file is not None:
        _file.write(text + "\n")
        _file.flush()


def where() -> str:
    """Where the file is, for the end of a message."""
    return f"; see {_file.name}" if _file is not None else ""
