"""Folders in buckets, ``gs://`` and ``s3://``, and their copies here. No other file knows how to reach them.

    gs://bucket/data  --copy_of-->  CACHE/buckets/data-1f3a.../.bucket      a text: the address

A copy is an ordinary folder, so that whoever reads files need not know of buckets. Its files come when they
are asked for, whole, and stay. The file ``.bucket`` above a path says what it is a copy of, so that processes
that read data need no word of it. Checkpoints have no copy: storage reads and writes them where they are, see
``beyond``.
"""

from __future__ import annotations

import datetime
import fnmatch
import functools
import hashlib
import importlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vl_jax.runtime.cache_folder import cache_folder

MARK = ".bucket"  # in a copy
APART = ("checkpoints",)  # folders that are not copied: what reads them goes to the bucket
_ADDRESS = re.compile(r"(gs|s3):/+([^/].*?)/*")  # pathlib leaves one of the slashes
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}


def address(path: object) -> str | None:
    """The address of a folder or file in a bucket, also as pathlib spells it; None of everything else."""
    found = _ADDRESS.fullmatch(str(path))
    return f"{found[1]}://{found[2]}" if found else None


def is_bucket(path: object) -> bool:
    """Whether something is in a bucket and not here."""
    return address(path) is not None


@functools.cache
def filesystem(kind: str) -> Any:
    """The file system of fsspec for ``gs`` or ``s3``; nothing of it is remembered, as others write there too.

    Raises:
      ValueError: the package that reaches such buckets is not installed.
    """
    try:
        importlib.import_module(_PACKAGES[kind])
        import fsspec
        from fsspec.config import conf
    except ImportError as error:
        raise ValueError(f"{kind}:// needs the package {error.name}: pip install 'vl_jax[cloud]'") from None
    for name in ("gs", "gcs", "s3"):
        conf[name] = {**conf.get(name, {}), "use_listings_cache": False}
    return fsspec.filesystem(kind)


def reached(place: str) -> tuple[Any, str]:
    """The file system of an address, and the path that it knows the place by."""
    kind, _, path = place.partition("://")
    return filesystem(kind), path


def copy_of(place: str) -> Path:
    """The folder here that stands for one in a bucket; it is made if it is absent, and may lack files."""
    name = f"{place.rpartition('/')[2][:40]}-{hashlib.sha256(place.encode()).hexdigest()[:16]}"
    folder = cache_folder("buckets") / name
    if not (folder / MARK).is_file():
        mark(folder, place)
    return folder.resolve()


def root_of(root: str) -> Path:
    """The folder that files of data are looked for from: itself or, of one in a bucket, its copy."""
    place = address(root)
    return Path(root) if place is None else copy_of(place)


def file_in(root: str, name: str) -> Path:
    """A file of data below a root, brought here if the root is in a bucket; it need not exist."""
    file = root_of(root) / name
    bring_one(file)
    return file


def mark(folder: Path, place: str) -> None:
    """Makes a folder that stands for one in a bucket."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{MARK}.{os.getpid()}.tmp"
    temporary.write_text(place, encoding="utf-8")
    os.replace(temporary, folder / MARK)


def here(path: str | Path) -> Path:
    """A folder here: the path itself or, of a folder in a bucket, a copy with all its files but checkpoints.

    Raises:
      ValueError: there is no such folder in the bucket.
    """
    place = address(path)
    if place is None:
        return Path(path)
    folder = copy_of(place)
    if not bring(folder, inventory(place)) + set_apart(folder):
        raise ValueError(f"{place}: no such folder, or nothing is in it")
    return folder


def set_apart(folder: Path) -> list[Path]:
    """Makes, in a copy, the empty folders that stand for those in the bucket which are not copied."""
    found = []
    for name in APART:
        files, path = reached(f"{origin(folder)}/{name}")
        if files.isdir(path):
            (folder / name).mkdir(exist_ok=True)
            found.append(folder / name)
    return found


def origin(path: Path) -> str | None:
    """The address of what a path stands for; None if it belongs to no copy."""
    for folder in (path, *path.parents):
        if (folder / MARK).is_file():
            place = (folder / MARK).read_text(encoding="utf-8")
            return place if folder == path else f"{place}/{path.relative_to(folder).as_posix()}"
    return None


def beyond(folder: Path) -> Any:
    """Where a folder really is: the path itself or, of a copy, a path of etils in the bucket."""
    place = origin(folder.absolute())
    if place is None:
        return folder.absolute()
    from etils import epath

    filesystem(place.partition("://")[0])
    if place.startswith("s3://"):
        from vl_jax.runtime.storage import s3_arrays

        s3_arrays.teach()
    return epath.Path(place)


def inventory(place: str, *, apart: Iterable[str] = APART) -> dict[str, tuple[int, float]]:
    """Every file below an address by its relative path: size, and time of change.

    Args:
      apart: names of folders that are left out, wherever they are.
    """
    files, path = reached(place)
    found = {}
    for name, facts in files.find(path, detail=True).items():
        relative = name.removeprefix(path).lstrip("/")
        inside = name.startswith(f"{path}/") and facts.get("type") == "file"
        if inside and relative and not {*relative.split("/")[:-1]} & {*apart}:
            found[relative] = (int(facts["size"]), _changed(facts))
    return found


def _changed(facts: dict[str, Any]) -> float:
    when = next(
        (facts[key] for key in ("LastModified", "updated", "mtime", "created") if facts.get(key)), None
    )
    if isinstance(when, str):
        when = datetime.datetime.fromisoformat(when)
    return float(int(when.timestamp() if isinstance(when, datetime.datetime) else when or 0))


def bring(folder: Path, wanted: dict[str, tuple[int, float]]) -> list[Path]:
    """Brings files into a copy, unless they are there as they are in the bucket; the paths of all."""
    place, paths = origin(folder), []
    for relative, (size, changed) in wanted.items():
        target = folder / relative
        paths.append(target)
        if target.is_file() and (state := target.stat()).st_size == size and state.st_mtime == changed:
            continue
        _fetch(f"{place}/{relative}", target)
        os.utime(target, (changed, changed))
    return paths


def bring_one(path: Path) -> None:
    """Brings the file of a path in a copy, if it is not there yet and the bucket has it."""
    if not str(path).startswith(_copies()) or path.exists():
        return
    place = origin(path)
    if place is not None:
        try:
            _fetch(place, path)
        except FileNotFoundError:
            return


@functools.cache
def _copies() -> str:
    return os.path.join(os.path.realpath(cache_folder("buckets")), "")


def _fetch(place: str, target: Path) -> None:
    files, path = reached(place)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        files.get_file(path, str(temporary))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def content(place: str) -> bytes:
    """What an object holds.

    Raises:
      FileNotFoundError: there is none.
    """
    files, path = reached(place)
    return files.cat_file(path)


def send(content: bytes, place: str) -> None:
    """Writes an object: the old one is there, or the new one, and never a part of it."""
    files, path = reached(place)
    files.pipe_file(path, content)


def delete(place: str) -> None:
    """Removes an object.

    Raises:
      FileNotFoundError: there is none.
    """
    files, path = reached(place)
    files.rm_file(path)


def matching(root: str, pattern: str) -> list[Path]:
    """Copies of the files below an address whose relative path fits a pattern, by their names."""
    folder, steps = root_of(root), pattern.split("/")
    start = next((n for n, step in enumerate(steps) if any(mark in step for mark in "*?[")), len(steps) - 1)
    inside = "/".join(steps[:start])
    found = inventory(f"{origin(folder)}/{inside}".rstrip("/"), apart=())
    names = {f"{inside}/{name}".lstrip("/"): state for name, state in found.items()}
    return sorted(bring(folder, {n: s for n, s in names.items() if _fits(n.split("/"), steps)}))


def _fits(names: list[str], steps: list[str]) -> bool:
    return len(names) == len(steps) and all(map(fnmatch.fnmatchcase, names, steps))


def remove(folder: Any) -> None:
    """Removes a folder, here or in a bucket; none need be there."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.rmtree()
