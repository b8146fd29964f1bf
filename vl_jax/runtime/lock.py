"""A lock on the folder of a run, which one process holds and which ends with that process.

The operating system keeps the lock, not a file's presence: whoever dies, and however, leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from vl_jax.runtime import disk
from vl_jax.runtime.storage import mirror
from vl_jax.runtime.storage.mirror import LOCK_FILE

_WITHOUT_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL)  # what such file systems answer
_log = logging.getLogger(__name__)


class InUse(ValueError):
    """Another process holds the lock of a folder; the message names that process and its host."""


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Holds the lock of a folder, which is made if it is absent, and goes again if an error left it empty.

    On a file system without locks it holds nothing and warns. Of a folder that stands for one in a bucket,
    that one is held as well.

    Raises:
      InUse, Held: another process holds it.
      OSError: the disk is full.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / LOCK_FILE
    with path.open("ab+", buffering=0) as file:  # what is not written at once would fail once more at the end
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "another process"
            raise InUse(
                f"--workdir={workdir} is in use by another run ({holder}); wait until it ends, stop it, or "
                "choose another folder"
            ) from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise
            _log.warning("%s cannot be locked (%s): begin no second run there", workdir, error.strerror)
        holder = f"process {os.getpid()} on {socket.gethostname()}\n".encode()
        file.truncate(0)
        with disk.naming(path, needed=len(holder)):
            file.write(holder)
        try:
            with mirror.held(workdir):
                yield
        except BaseException:
            _remove_if_empty(workdir)
            raise


def _remove_if_empty(workdir: Path) -> None:
    """Removes a folder in which there is only the lock, which must be held: nothing has begun there."""
    with contextlib.suppress(OSError):
        if os.listdir(workdir) == [LOCK_FILE]:
            (workdir / LOCK_FILE).unlink()
            workdir.rmdir()
