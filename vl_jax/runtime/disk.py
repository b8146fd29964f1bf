"""Writing files whole, and saying in one line when a disk is full."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# The disk is full, the share of this user is used up, or a file may not be so large.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def naming(path: Path, *, needed: int = 0) -> Iterator[None]:
    """Around writing a file: if there is no room for it, the error says where and how much.

    Args:
      needed: bytes that are written; 0: not known.

    Raises:
      OSError: there is no room.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(error.errno, _no_room(path, needed, error)) from None


def _no_room(path: Path, needed: int, error: OSError) -> str:
    free = ""
    with contextlib.suppress(OSError):
        folder = next(p for p in (path, *path.absolute().parents) if p.is_dir())
        free = f"{shutil.disk_usage(folder).free:,} bytes are free; "
    wanted = f"{needed:,} bytes more are needed, " if needed else ""
    reason = os.strerror(error.errno or 0).lower()
    return f"cannot write {path}: {reason}; {wanted}{free}make room and run the same command again"


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file in one move: after a crash it is the old one or the new one, never a part of it.

    Raises:
      OSError: it cannot be written; on a full disk the message says how many bytes are needed.
    """
    temporary = path.with_name(path.name + ".tmp")
    with naming(path, needed=len(content)):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, temporary)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """The same of a text, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))
