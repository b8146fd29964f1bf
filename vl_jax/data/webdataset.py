"""Tar files of samples, as webdataset writes them: neighbouring members that share a name are one sample.

    shard-0000.tar    a.jpg a.json  |  b.jpg b.txt  |  c.0.png c.1.png c.json  | ...

A ``json`` member is a record (see ``conversation``), a ``txt`` member a caption; the images are those beside
it, in their order. Nothing is ever unpacked: members are read in place, whatever their names are.
"""

from __future__ import annotations

import functools
import os
import tarfile
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vl_jax.data.conversation import parse
from vl_jax.data.llava import parse_line
from vl_jax.data.sample import DEFAULT_MAX_PIXELS, BadSample, EncodedImage, Sample
from vl_jax.data.shards import Places, check_fields, find_files

_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
_MAX_TEXT = 1 << 24  # bytes of a record


@dataclass(frozen=True)
class WebDatasetConfig:
    """Uncompressed tar files; ``file`` may be a pattern."""

    name: str
    file: str  # relative to the data root, such as "shards/*.tar"
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self):
        check_fields(self.name, self.file, (".tar",), self.max_pixels)


class _Group(NamedTuple):
    """Where the members of one sample are in their file: (ending, offset, size)."""

    key: str
    members: list[tuple[str, int, int]]


class _Shard:
    """The samples of one file: a few numbers each, so that millions of them fit in memory."""

    def __init__(self):
        self._first = array("q")  # member of each sample
        self._keys, self._key_ends = bytearray(), array("q")  # their names, one behind the other
        self._offsets, self._sizes, self._endings = array("q"), array("q"), array("H")
        self._names: dict[str, int] = {}  # of endings, numbered
        self._last = ""

    def __len__(self) -> int:
        return len(self._first)

    def __getitem__(self, index: int) -> _Group:
        names, start = list(self._names), self._key_ends[index - 1] if index else 0
        key = self._keys[start : self._key_ends[index]].decode("utf-8", "surrogatepass")
        stop = self._first[index + 1] if index + 1 < len(self) else len(self._offsets)
        members = range(self._first[index], stop)
        return _Group(key, [(names[self._endings[m]], self._offsets[m], self._sizes[m]) for m in members])

    def add(self, key: str, ending: str, offset: int, size: int) -> None:
        """Notes a member; neighbours of one name are one sample.

        Raises:
          OverflowError: there are all too many different endings.
        """
        if not len(self) or key != self._last:
            self._last = key
            self._first.append(len(self._offsets))
            self._keys += key.encode("utf-8", "surrogatepass")
            self._key_ends.append(len(self._keys))
        self._offsets.append(offset)
        self._sizes.append(size)
        self._endings.append(self._names.setdefault(ending, len(self._names)))


class WebDatasetSource:
    """Random access to the samples of tar files.

    Raises (on opening):
      ValueError: there is no file, or one is no tar; with the position where it stops being one.
    """

    def __init__(self, config: WebDatasetConfig, *, root: str = "."):
        self._config = config
        self.files = find_files(root, config.file, config.name)
        self._shards = [_scan(file) for file in self.files]
        self._places = Places([len(shard) for shard in self._shards])

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"WebDatasetSource({self._config.file!r}, {len(self.files)} files, {len(self)} records)"

    def __getitem__(self, index: int) -> Sample:
        """The sample of record ``index``.

        Raises:
          BadSample: it breaks a rule; the message names the file and the member.
        """
        number, place = self._places[index]
        file, group = self.files[number], self._shards[number][place]
        where = f"{file}, {group.key[:80]!r}, record {index}"
        images = [m for m in group.members if m[0].rpartition(".")[2] in _IMAGES]
        record = self._record(file, group, where)
        if isinstance(record, dict):  # The names in it are those the images had before they came here.
            record = {k: v for k, v in record.items() if k not in ("image", "images")}
        found = parse(record, where, default_id=group.key, num_images=len(images))
        where = f"sample {found.id} ({where})"
        return Sample(
            id=found.id,
            turns=found.turns,
            images=tuple(self._image(file, member, where) for member in images),
            system=found.system,
        )

    def _record(self, file: Path, group: _Group, where: str) -> Any:
        for ending, offset, size in group.members:
            if ending in ("json", "txt"):
                if size > _MAX_TEXT:
                    raise BadSample("too_large", f"sample ? ({where}): .{ending} of {size} bytes")
                data = _read(file, offset, size, where)
                if ending == "json":
                    return parse_line(data, where)
                return {"text": data.decode("utf-8", errors="replace").strip()}
        endings = ", ".join(ending for ending, _, _ in group.members)[:80]
        raise BadSample(
            "no_record", f"sample ? ({where}): neither .json nor .txt beside {endings or 'nothing'}"
        )

    def _image(self, file: Path, member: tuple[str, int, int], where: str) -> EncodedImage:
        ending, offset, size = member
        read = functools.partial(_read, file, offset, size, where)
        return EncodedImage(read, f".{ending}", where, self._config.max_pixels)


def _scan(file: Path) -> _Shard:
    """The samples of a tar file, by reading the headers of its members one after the other."""
    shard = _Shard()
    length, position = file.stat().st_size, 0
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                position = member.offset
                if not member.isreg() or member.sparse is not None:
                    continue  # Links and devices are no samples, and are never followed.
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError(f"{member.name[:80]!r} is cut off")
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                if not stem or not ending:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                shard.add(key, ending.lower(), member.offset_data, member.size)
                vars(archive)["members"].clear()  # It would keep them all.
            position = archive.offset
        with file.open("rb") as opened:
            if any(os.pread(opened.fileno(), 512, position)):  # To tarfile, a broken header is just the end.
                raise tarfile.ReadError("neither a header nor the end")
    except (tarfile.TarError, ValueError, OSError, EOFError, OverflowError) as error:
        raise ValueError(f"{file}: no sound uncompressed tar file at byte {position}: {error}") from None
    return shard


def _read(file: Path, offset: int, size: int, where: str) -> bytes:
    with file.open("rb") as opened:
        data = os.pread(opened.fileno(), size, offset)
    if len(data) != size:
        raise BadSample("cut_off", f"{where}: {len(data)} bytes of {size}")
    return data
