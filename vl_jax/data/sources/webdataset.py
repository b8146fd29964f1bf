"""Tar files of samples, as webdataset writes them: neighbouring members that share a name are one sample.

    shard-0000.tar    a.jpg a.json  |  b.jpg b.txt  |  c.0.png c.1.png c.json  | ...

A ``json`` member is a record (see ``conversation``), a ``txt`` member a caption; the images are those beside
it, in their order. Nothing is ever unpacked: members are read in place, whatever their names are, and where
they are is kept for the next time.
"""

from __future__ import annotations

import functools
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vl_jax.data.files.index_cache import Arrays, Done, keep
from vl_jax.data.files.shards import Places, check_fields, find_files
from vl_jax.data.files.tar import walk
from vl_jax.data.picture import Orientation
from vl_jax.data.sample import DEFAULT_MAX_PIXELS, BadSample, EncodedImage, Sample
from vl_jax.data.sources.conversation import parse
from vl_jax.data.sources.llava import parse_line

_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
_MAX_TEXT = 1 << 24  # bytes of a record
_MOST_ENDINGS = 1 << 16
_SHOWN = 1 << 10  # samples found between two signs of progress


@dataclass(frozen=True)
class WebDatasetConfig:
    """Uncompressed tar files; ``file`` may be a pattern."""

    name: str
    file: str  # relative to the data root, such as "shards/*.tar"
    max_pixels: int = DEFAULT_MAX_PIXELS
    labels: tuple[str, ...] = ()  # fields of a record that are labels; "answer": what the first turn answers
    caption: bool = False  # the only answer of a record is read as a text, and its question is not

    def __post_init__(self):
        check_fields(self.name, self.file, (".tar",), self.max_pixels)


class _Group(NamedTuple):
    """Where the members of one sample are in their file: (ending, offset, size)."""

    key: str
    members: list[tuple[str, int, int]]


class _Samples:
    """The samples of all files: a few numbers each, so that millions of them fit in memory."""

    def __init__(self, arrays: Arrays):
        """Takes what ``_index`` made."""
        self._arrays = arrays
        self.counts = arrays["counts"].tolist()
        self._endings = arrays["endings"].tobytes().decode("utf-8", "replace").split("\0")

    def __getitem__(self, index: int) -> _Group:
        of = self._arrays
        key = of["keys"][of["key_starts"][index] : of["key_starts"][index + 1]].tobytes()
        members = slice(of["first"][index], of["first"][index + 1])
        endings = [self._endings[number] for number in of["ending"][members]]
        places = zip(endings, of["offset"][members].tolist(), of["size"][members].tolist(), strict=True)
        return _Group(key.decode("utf-8", "replace"), list(places))


class WebDatasetSource:
    """Random access to the samples of tar files.

    Raises (on opening):
      ValueError: there is no file, or one is no tar; with the position where it stops being one.
    """

    def __init__(self, config: WebDatasetConfig, *, root: str = ".", orientation: Orientation = "shown"):
        self._config = config
        self._orientation: Orientation = orientation
        self.files = find_files(root, config.file, config.name)
        lengths = [file.stat().st_size for file in self.files]
        make, sound = functools.partial(_index, self.files), functools.partial(_is_sound, lengths)
        self._samples = _Samples(keep("tar-1", self.files, make, sound))
        self._places = Places(self._samples.counts)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"WebDatasetSource({self._config.file!r}, {len(self.files)} files, {len(self)} records)"

    def __getitem__(self, index: int) -> Sample:
        """The sample of record ``index``.

        Raises:
          BadSample: it breaks a rule; the message names the file and the member.
        """
        number, _ = self._places[index]
        file, group = self.files[number], self._samples[index]
        where = f"{file}, {group.key[:80]!r}, record {index}"
        images = [m for m in group.members if m[0].rpartition(".")[2] in _IMAGES]
        record = self._record(file, group, where)
        if isinstance(record, dict):  # The names in it are those the images had before they came here.
            record = {k: v for k, v in record.items() if k not in ("image", "images")}
        found = parse(
            record,
            where,
            default_id=group.key,
            num_images=len(images),
            labels=self._config.labels,
            caption=self._config.caption,
            images=lambda _, where: self._images(file, images, where),
        )
        return Sample(
            id=found.id,
            turns=found.turns,
            images=self._images(file, images, f"sample {found.id} ({where})"),
            system=found.system,
            labels=found.labels,
            notes=found.notes,
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

    def _images(
        self, file: Path, members: Sequence[tuple[str, int, int]], where: str
    ) -> tuple[EncodedImage, ...]:
        limit, orientation = self._config.max_pixels, self._orientation
        reads = [functools.partial(_read, file, offset, size, where) for _, offset, size in members]
        return tuple(
            EncodedImage(read, f".{ending}", where, limit, orientation)
            for read, (ending, _, _) in zip(reads, members, strict=True)
        )


def _index(files: Sequence[Path], done: Done) -> Arrays:
    """Where all samples are; neighbouring members of one name are one sample.

    Returns:
      counts: i64[f] samples of each file.
      first: i64[n + 1] the first member of each sample.
      keys, key_starts: u8[...], i64[n + 1] the names of the samples, one behind the other.
      offset, size, ending: i64[m], i64[m], u16[m] of each member, its ending by number.
      endings: u8[...] the different endings, a NUL between two.

    Raises:
      ValueError: a file is no sound tar file, or there are too many endings.
    """
    counts, first, keys, key_starts = array("q"), array("q"), bytearray(), array("q")
    offsets, sizes, endings = array("q"), array("q"), array("H")
    numbers: dict[bytes, int] = {}
    before = 0  # bytes of the files already walked
    for file in files:
        count, last = len(first), None
        for name, offset, size in walk(file):
            base = name[name.rfind(b"/") + 1 :]
            stem, _, ending = base.partition(b".")
            if not stem or not ending:
                continue
            key = name[: -len(ending) - 1]
            if key != last:
                last = key
                first.append(len(offsets))
                key_starts.append(len(keys))
                keys += key
                if not len(first) % _SHOWN:
                    done(before + offset)
            offsets.append(offset)
            sizes.append(size)
            number = numbers.get(ending)
            if number is None:
                number = numbers[ending] = len(numbers)
                if number >= _MOST_ENDINGS:
                    raise ValueError(f"{file}: more than {_MOST_ENDINGS} different endings of names")
            endings.append(number)
        counts.append(len(first) - count)
        before += file.stat().st_size
        done(before)
    first.append(len(offsets))
    key_starts.append(len(keys))
    arrays = {"counts": counts, "first": first, "key_starts": key_starts, "offset": offsets, "size": sizes}
    texts = {"keys": keys, "endings": b"\0".join(numbers).lower()}
    found: Arrays = {name: np.frombuffer(numbers, np.int64) for name, numbers in arrays.items()}
    found |= {name: np.frombuffer(text, np.uint8) for name, text in texts.items()}
    return found | {"ending": np.frombuffer(endings, np.uint16)}


def _is_sound(lengths: Sequence[int], arrays: Arrays) -> bool:
    """Whether an index points into files of that many bytes, and nowhere else."""
    first, starts, offset, size = (arrays[name] for name in ("first", "key_starts", "offset", "size"))
    ends = np.array([0, *np.cumsum(arrays["counts"])])  # of the samples of each file
    if not (
        len(first) == len(starts) == ends[-1] + 1
        and len(ends) == len(lengths) + 1
        and len(offset) == len(size) == len(arrays["ending"])
        and _rises(ends, len(first) - 1)
        and _rises(first, len(offset))
        and _rises(starts, len(arrays["keys"]))
    ):
        return False
    limit = np.repeat(np.array(lengths), np.diff(first[ends]))
    inside = (offset >= 0) & (size >= 0) & (size <= limit) & (offset <= limit - size)
    return bool(inside.all() and (arrays["ending"] <= (arrays["endings"] == 0).sum()).all())


def _rises(places: np.ndarray, last: int) -> bool:
    """Whether places go from 0 up to the last."""
    return bool(places[0] == 0 and places[-1] == last and (places[1:] >= places[:-1]).all())


def _read(file: Path, offset: int, size: int, where: str) -> bytes:
    with file.open("rb") as opened:
        data = os.pread(opened.fileno(), size, offset)
    if len(data) != size:
        raise BadSample("cut_off", f"{where}: {len(data)} bytes of {size}")
    return data
