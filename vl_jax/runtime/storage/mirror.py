"""The folder of a run in a bucket: its files are written here and sent there, checkpoints go straight.

    here: an ordinary folder     --push, every 20 s, before each checkpoint, at the end-->     gs://bucket/run
                                 <--pull, at the beginning--

An object store cannot append. Small files are sent whole when they have changed. Logs that grow, ``.jsonl``
and those of TensorBoard, are sent in parts of 1 MiB once they are larger: ``metrics.jsonl.parts/000000`` and
so on, of which only the last one changes. So a push sends at most 1 MiB of a log beside what is new.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from vl_jax.runtime.storage import buckets, object_lock

PART = 1 << 20  # bytes
EVERY_S = 20.0
_PARTS = ".parts"
LOCK_FILE = "run.lock"  # who holds the run, in words
_UNSENT = (buckets.MARK, LOCK_FILE)
_log = logging.getLogger(__name__)


class Mirror:
    """A folder here and the one in a bucket that it stands for."""

    def __init__(self, place: str, folder: Path):
        """Takes an address, and a folder here; see ``pull`` and ``push``."""
        self.place, self.folder = place, folder
        self._sent: dict[
            str, str
        ] = {}  # what the bucket has, by object: state of a file, or digest of a part
        self._lock = threading.Lock()
        buckets.mark(folder, place)

    def pull(self) -> None:
        """Brings all files of the run here, but for its checkpoints."""
        found = buckets.inventory(self.place)
        whole = {name: state for name, state in found.items() if _PARTS not in name}
        grown: dict[str, list[str]] = {}
        for name in sorted(found.keys() - whole.keys()):
            grown.setdefault(name.rpartition("/")[0].removesuffix(_PARTS), []).append(name)
        buckets.bring(self.folder, {n: s for n, s in whole.items() if n not in grown and n not in _UNSENT})
        for log, parts in grown.items():
            buckets.bring(self.folder, {part: found[part] for part in parts})
            with (self.folder / log).open("wb") as joined:
                for part in parts:
                    content = (self.folder / part).read_bytes()
                    joined.write(content)
                    self._sent[part] = _digest(content)
            shutil.rmtree((self.folder / parts[0]).parent)
        for name in whole.keys() - grown.keys() - {*_UNSENT}:
            self._sent[name] = _state(self.folder / name)
        buckets.set_apart(self.folder)

    def push(self) -> None:
        """Sends what has changed here, and removes there what was removed here.

        Raises:
          OSError: the bucket cannot be reached, or refuses.
        """
        with self._lock:
            kept: set[str] = set()
            for file in sorted(self.folder.rglob("*")):
                name = file.relative_to(self.folder).as_posix()
                if file.is_dir() or name in _UNSENT or name.endswith(".tmp"):
                    continue
                if {*name.split("/")[:-1]} & {*buckets.APART}:
                    continue
                kept |= self._send_parts(file, name) if _grows(file) else self._send(file, name)
            for name in self._sent.keys() - kept:
                with contextlib.suppress(FileNotFoundError):
                    buckets.delete(f"{self.place}/{name}")
                del self._sent[name]

    def _send(self, file: Path, name: str) -> set[str]:
        try:
            state = _state(file)
            if self._sent.get(name) != state:
                buckets.send(file.read_bytes(), f"{self.place}/{name}")
                self._sent[name] = state
        except FileNotFoundError:  # it was renamed meanwhile
            return set()
        return {name}

    def _send_parts(self, file: Path, name: str) -> set[str]:
        """Parts are sent in order, so that what is there is always a beginning of the log."""
        names = set()
        with file.open("rb") as log:
            for number, content in enumerate(iter(lambda: log.read(PART), b"")):
                part = f"{name}{_PARTS}/{number:06d}"
                names.add(part)
                if self._sent.get(part) != (digest := _digest(content)):
                    buckets.send(content, f"{self.place}/{part}")
                    self._sent[part] = digest
        return names


def _grows(file: Path) -> bool:
    return (file.suffix == ".jsonl" or "tfevents" in file.name) and file.stat().st_size > PART


def _state(file: Path) -> str:
    state = file.stat()
    return f"{state.st_size} {state.st_mtime_ns}"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


_MIRRORS: list[Mirror] = []  # of this process


def push_above(path: object) -> None:
    """Sends what has changed in the run that something in a bucket belongs to; nothing for what is here."""
    for mirror in _MIRRORS:
        if str(path).startswith(f"{mirror.place}/"):
            mirror.push()


@contextlib.contextmanager
def mirrored(place: str, *, lead: bool = True) -> Iterator[Path]:
    """A folder here that stands for the run in a bucket while the context lasts, and has its files.

    Where the files cannot be sent in the end, the folder stays and the error names it.

    Args:
      lead: whether this is the process that holds the run and sends its files.

    Raises:
      InUse: another process has the run.
      OSError: the bucket cannot be reached.
    """
    outer = Path(tempfile.mkdtemp(prefix="vl_jax_")).resolve()
    folder = outer / place.rpartition("/")[2]
    mirror, done = Mirror(place, folder), threading.Event()
    try:
        mirror.pull()
        if not lead:
            yield folder
            return
        thread = threading.Thread(target=_keep_sending, args=(mirror, done), name="bucket", daemon=True)
        _MIRRORS.append(mirror)
        thread.start()
        try:
            yield folder
        finally:
            done.set()
            thread.join(timeout=EVERY_S)  # what it sends now is sent again below
            _MIRRORS.remove(mirror)
            try:
                mirror.push()
            except Exception as error:
                kept = Path(shutil.copytree(folder, f"{outer}_unsent"))
                raise OSError(
                    f"{place}: the last files were not sent ({error}); they are in {kept}"
                ) from None
    finally:
        shutil.rmtree(outer, ignore_errors=True)


@contextlib.contextmanager
def folder_of(path: object, *, lead: bool = True) -> Iterator[Path]:
    """The folder of a run as it can be worked with here; see ``mirrored`` if it is in a bucket."""
    place = buckets.address(path)
    if place is None:
        yield Path(str(path))
        return
    with mirrored(place, lead=lead) as folder:
        yield folder


def _keep_sending(mirror: Mirror, done: threading.Event) -> None:
    told = False
    while not done.wait(EVERY_S):
        try:
            mirror.push()
            told = False
        except Exception as error:  # a bucket may be away for a while; the next checkpoint needs it
            if not told:
                _log.warning("files are not sent for now: %s: %s", type(error).__name__, error)
            told = True


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds the run in a bucket that a folder stands for, if it does; see ``object_lock.held``."""
    found = next((mirror for mirror in _MIRRORS if mirror.folder == folder.resolve()), None)
    if found is None:
        yield
        return
    with object_lock.held(f"{found.place}/{LOCK_FILE}"):
        found.pull()  # whoever had the run may have sent more since
        yield
