"""Tar files of samples, as webdataset writes them: neighbouring members that share a name are one sample.

    shard-0000.tar    a.jpg a.json  |  b.jpg b.txt  |  c.0.png c.1.png c.json  | ...

A ``json`` member is a record (see ``conversation``). If it is none, but says what is known of the picture,
as img2dataset writes it, the caption is the ``txt`` member beside it, or the field ``caption``; ``text`` of
the config names another. Images are all others, in their order, numbers in order of size. Members may come in
any order; a name that comes again with members it had before is another sample. Nothing is ever unpacked:
members are read in place, whatever their names are, and where they are is kept for the next time.
"""

from __future__ import annotations

import functools
import os
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vl_jax.data.files.encoding import to_text
from vl_jax.data.files.index_cache import Arrays, Done, keep
from vl_jax.data.files.shards import Places, check_fields, find_files
from vl_jax.data.files.tar import walk
from vl_jax.data.picture import Orientation
from vl_jax.data.sample import DEFAULT_MAX_PIXELS, BadSample, EncodedImage, Note, Sample, in_one_line
from vl_jax.data.sources.conversation import parse
from vl_jax.data.sources.keys import meant
from vl_jax.data.sources.llava import parse_text
from vl_jax.data.sources.messages import dialect_of

_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
_TEXTS = ("txt", "text", "caption")  # endings of captions
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
    text: str = ""  # the ending of a member, or the field of a record, that is the caption; empty: see above

    def __post_init__(self):
        check_fields(self.name, self.file, (".tar",), self.max_pixels)

    def open(self, root: str, *, orientation: Orientation = "shown") -> WebDatasetSource:
        """The source; files are relative to ``root``."""
        return WebDatasetSource(self, root=root, orientation=orientation)


class _Group(NamedTuple):
    """Where the members of one sample are in their file: (ending, offset, size)."""

    key: str
    members: list[tuple[str, int, int]]
    again: bool  # whether an earlier sample of the file has the name


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
        return _Group(key.decode("utf-8", "replace"), list(places), bool(of["again"][index]))


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
        self._samples = _Samples(keep("tar-2", self.files, make, sound))
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
        where = f"{file}, {in_one_line(group.key[:80])!r}, record {index}"
        images = _in_order([m for m in group.members if m[0].rpartition(".")[2] in _IMAGES])
        record, notes = self._record(file, group, where)
        if group.again and not images:
            message = f"sample ? ({where}): the same name and ending as an earlier member, without a picture"
            raise BadSample("member_twice", message)
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
            notes=(*notes, *found.notes),
        )

    def _record(self, file: Path, group: _Group, where: str) -> tuple[Any, list[Note]]:
        """What a sample says, and what beside it is not read."""
        wanted, place = self._config.text, f"sample ? ({where})"
        texts = {m[0]: m for m in group.members if m[0] in ("json", wanted, *_TEXTS)}
        captions = [ending for ending in (wanted, *_TEXTS) if ending in texts and ending != "json"]
        notes = [
            Note("member_not_read", f"{place}: a member .{ending[:40]} is not read")
            for ending, _, _ in group.members
            if ending not in texts and ending.rpartition(".")[2] not in _IMAGES
        ]
        about, record = {}, None
        if "json" in texts:
            record, problem = self._json(file, texts["json"], where, needed=not captions)
            notes += [problem] if problem else []
            about = record if isinstance(record, dict) else {}
        kept = {key: value for key, value in about.items() if key in {"id", "lang", *self._config.labels}}
        if wanted and wanted not in texts:
            if wanted not in about:
                found = meant({**texts, **about}, (wanted,))
                raise BadSample("missing_field", f"{place}: no member or field {wanted!r}; {found}")
            return {**kept, "text": about[wanted]}, notes
        is_record = bool(dialect_of({key: value for key, value in about.items() if key != "caption"}))
        if captions and (wanted or not is_record):
            return {**kept, "text": self._text(file, texts[captions[0]], where)}, notes
        if captions:
            message = f"{place}: a member .{captions[0]} is not read: .json is a record of its own"
            notes.append(Note("member_not_read", message))
        if "json" not in texts:
            endings = ", ".join(ending for ending, _, _ in group.members)[:80] or "nothing"
            raise BadSample("no_record", f"{place}: neither .json nor .txt beside {endings}")
        if not is_record and isinstance(about.get("caption"), str):
            return {**kept, "caption": about["caption"]}, notes
        return record, notes

    def _json(
        self, file: Path, member: tuple[str, int, int], where: str, *, needed: bool
    ) -> tuple[Any, Note | None]:
        """The JSON of a member, or a note of why it cannot be read where there is something else to read."""
        try:
            record = parse_text(self._text(file, member, where), where)
        except BadSample as error:
            if needed or self._config.labels:
                raise
            return None, Note(error.reason, f"{error}: .json is not read")
        if needed or isinstance(record, dict):
            return record, None
        return None, Note("not_an_object", f"sample ? ({where}): .json is not read: it is no object")

    def _text(self, file: Path, member: tuple[str, int, int], where: str) -> str:
        data = self._bytes(file, member, where)
        try:
            return to_text(data).strip()
        except ValueError as error:
            raise BadSample("not_utf8", f"sample ? ({where}): .{member[0]}: {error}") from None

    def _bytes(self, file: Path, member: tuple[str, int, int], where: str) -> bytes:
        ending, offset, size = member
        if size > _MAX_TEXT:
            message = f"sample ? ({where}): .{ending} of {size} bytes, limit {_MAX_TEXT}"
            raise BadSample("too_large", message)
        return _read(file, offset, size, where)

    def _images(
        self, file: Path, members: Sequence[tuple[str, int, int]], where: str
    ) -> tuple[EncodedImage, ...]:
        limit, orientation = self._config.max_pixels, self._orientation
        reads = [functools.partial(_read, file, offset, size, where) for _, offset, size in members]
        return tuple(
            EncodedImage(read, f".{ending}", where, limit, orientation)
            for read, (ending, _, _) in zip(reads, members, strict=True)
        )


def _in_order(images: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Pictures as their numbers count them, ``2.png`` before ``10.png``; as they are if one has none."""
    numbers = [ending.partition(".")[0] for ending, _, _ in images]
    if not all(number.isdecimal() and len(number) < 10 for number in numbers):
        return images
    return [image for _, image in sorted(zip(map(int, numbers), images, strict=True), key=lambda i: i[0])]


class _Index:
    """Where the samples of files are, as they are found."""

    def __init__(self):
        self.arrays = {name: array("q") for name in ("counts", "first", "key_starts", "offset", "size")}
        self.ending, self.again = array("H"), array("B")
        self.keys = bytearray()
        self._numbers: dict[bytes, int] = {}  # of the different endings

    def add(self, file: Path, shown: Callable[[int], None]) -> None:
        """Adds a file; ``shown`` is told now and then where in it this is.

        Raises:
          ValueError: it is no sound tar file, or there are too many endings.
        """
        of, count = self.arrays, len(self.again)
        begin, last, seen, twice = len(of["offset"]), None, set(), False
        hashes = array("q")  # of the names, of which one that comes again has to be found
        for name, offset, size in walk(file):
            base = name[name.rfind(b"/") + 1 :]
            stem, _, ending = base.partition(b".")
            if not stem or not ending:
                continue
            key, ending = name[: -len(ending) - 1], ending.lower()
            if key != last:
                last, seen = key, set()
                hashes.append(hash(key))
                self._begin(key, again=False)
                if not len(self.again) % _SHOWN:
                    shown(offset)
            twice |= ending in seen
            seen.add(ending)
            of["offset"].append(offset)
            of["size"].append(size)
            self.ending.append(self._number(file, ending))
        if twice or len(np.unique(np.frombuffer(hashes, np.int64))) < len(hashes):
            self._regroup(count, begin)
        of["counts"].append(len(self.again) - count)

    def _begin(self, key: bytes, *, again: bool) -> None:
        self.arrays["first"].append(len(self.arrays["offset"]))
        self.arrays["key_starts"].append(len(self.keys))
        self.again.append(again)
        self.keys += key

    def _number(self, file: Path, ending: bytes) -> int:
        number = self._numbers.setdefault(ending, len(self._numbers))
        if number >= _MOST_ENDINGS:
            raise ValueError(f"{file}: more than {_MOST_ENDINGS} different endings of names")
        return number

    def _regroup(self, count: int, begin: int) -> None:
        """Puts the members of the last file together by name, wherever they are.

        A name whose ending came before begins another sample: of several such, each has one.

        Args:
          count, begin: samples and members of the files before it.
        """
        of = self.arrays
        stops = [*of["first"][count + 1 :], len(of["offset"])]
        starts, ends = of["key_starts"][count:], [*of["key_starts"][count + 1 :], len(self.keys)]
        groups: dict[tuple[bytes, int], list[tuple[int, int, int]]] = {}
        times: Counter[tuple[bytes, int]] = Counter()  # that a name had an ending
        for first, stop, start, end in zip(of["first"][count:], stops, starts, ends, strict=True):
            key = bytes(self.keys[start:end])
            for member in range(first, stop):
                ending = self.ending[member]
                place = (of["offset"][member], of["size"][member], ending)
                groups.setdefault((key, times[key, ending]), []).append(place)
                times[key, ending] += 1
        del self.keys[starts[0] :]
        for name in ("first", "key_starts"):
            del of[name][count:]
        for name in ("offset", "size"):
            del of[name][begin:]
        del self.ending[begin:], self.again[count:]
        for (key, time), members in groups.items():
            self._begin(key, again=time > 0)
            for offset, size, ending in members:
                of["offset"].append(offset)
                of["size"].append(size)
                self.ending.append(ending)

    def finish(self) -> Arrays:
        """What was found, as arrays."""
        self.arrays["first"].append(len(self.arrays["offset"]))
        self.arrays["key_starts"].append(len(self.keys))
        found: Arrays = {name: np.frombuffer(numbers, np.int64) for name, numbers in self.arrays.items()}
        texts = {"keys": self.keys, "endings": b"\0".join(self._numbers)}
        found |= {name: np.frombuffer(text, np.uint8) for name, text in texts.items()}
        found["again"] = np.frombuffer(self.again, np.uint8)
        return found | {"ending": np.frombuffer(self.ending, np.uint16)}


def _index(files: Sequence[Path], done: Done) -> Arrays:
    """Where all samples are; members of one name in a file are one sample.

    Returns:
      counts: i64[f] samples of each file.
      first: i64[n + 1] the first member of each sample.
      keys, key_starts: u8[...], i64[n + 1] the names of the samples, one behind the other.
      again: u8[n] whether an earlier sample of the same file has the same name.
      offset, size, ending: i64[m], i64[m], u16[m] of each member, its ending by number.
      endings: u8[...] the different endings, a NUL between two.

    Raises:
      ValueError: a file is no sound tar file, or there are too many endings.
    """
    index, before = _Index(), 0  # bytes of the files already walked
    for file in files:
        start = before
        index.add(file, lambda offset, start=start: done(start + offset))
        before += file.stat().st_size
        done(before)
    return index.finish()


def _is_sound(lengths: Sequence[int], arrays: Arrays) -> bool:
    """Whether an index points into files of that many bytes, and nowhere else."""
    first, starts, offset, size = (arrays[name] for name in ("first", "key_starts", "offset", "size"))
    ends = np.array([0, *np.cumsum(arrays["counts"])])  # of the samples of each file
    if not (
        len(first) == len(starts) == ends[-1] + 1
        and len(ends) == len(lengths) + 1
        and len(arrays["again"]) == len(first) - 1
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
