"""Folders on file systems that may refuse to rename one, as mounted buckets do: gcsfuse, s3fs and the like.

A single file can be renamed there, and a folder is then moved file by file. So that nobody takes a half-moved
folder for a whole one, the file that says that it is whole comes last.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from pathlib import Path

# What such file systems answer; gcsfuse says EMFILE of a folder with more files than its --rename-dir-limit.
_REFUSED = (errno.ENOSYS, errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EMFILE)


def can_be_renamed(place: Path) -> bool:
    """Whether a folder below this one can be renamed, by trying; also where nothing can be written."""
    before = place / f".probe-{uuid.uuid4().hex}"
    after = before.with_name(f"{before.name}-renamed")
    try:
        before.mkdir(parents=True)
        (before / "file").write_bytes(b"")
    except OSError:
        return True
    try:
        os.rename(before, after)
    except OSError:
        return False
    finally:
        for folder in (before, after):
            shutil.rmtree(folder, ignore_errors=True)
    return True


def move(source: Path, target: Path, *, last: str = "") -> None:
    """Renames a folder; where that is refused, moves its files one by one.

    A call that was interrupted, or ran beside another one, is finished by calling again.

    Args:
      last: the file by which others know that the target is whole; it is moved when all others are there.

    Raises:
      OSError: it cannot be moved, or the target is a folder with something else in it.
    """
    try:
        if not target.exists():
            os.rename(source, target)
            return
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
    files = sorted(file.relative_to(source) for file in source.rglob("*") if not file.is_dir())
    for file in sorted(files, key=lambda file: str(file) == last):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another process has moved it
            os.replace(source / file, target / file)
    shutil.rmtree(source, ignore_errors=True)
