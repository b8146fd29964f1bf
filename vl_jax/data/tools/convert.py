"""Any source to ArrayRecord files: every image decoded once, bad records left out, counted and listed.

A sound is kept as the picture that the source's config makes of it.

    DIR.partial/  part-00000.arrayrecord  part-00000.json  ...   --when all are there-->   DIR/
                  source.json                                                               report.json

A part is done when the account beside it is written, so a conversion that was killed goes on behind its last
part; and there is no ``DIR`` before everything is in it. Several workers may share the parts, on one host or
on many: a part is the same whoever writes it, and whoever finds that all are there makes ``DIR`` of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vl_jax.data.files.shards import temporary_name
from vl_jax.data.picture import Orientation
from vl_jax.data.sample import BadSample, Sample, Source
from vl_jax.data.sources import array_records
from vl_jax.data.sources.build import SourceConfig, stamp_of
from vl_jax.data.sources.merged import MergedSource
from vl_jax.runtime.storage import folders

Split = Callable[[Sample], list[Sample]]

_AHEAD = 64  # records read and encoded while others are written
REPORT, _SOURCE = "report.json", "source.json"


@dataclass(frozen=True)
class Report:
    """What became of the records of a source."""

    records: int  # written
    skipped: dict[str, str]  # each record left out, by its number (once merged): place and reason
    split: int = 0  # of the source's records, those that became several
    merged: int = 0  # those that were added to an earlier one about the same pictures
    partial: dict[str, list[str]] = field(default_factory=dict)  # what is left out of records that are kept

    @property
    def reasons(self) -> dict[str, int]:
        """How many records were left out, by reason."""
        return dict(Counter(message.rpartition("[")[2].rstrip("]") for message in self.skipped.values()))

    def __str__(self) -> str:
        left = ", ".join(f"{n} {reason}" for reason, n in self.reasons.items())
        several = f", {self.split} were split" if self.split else ""
        fewer = f", {self.merged} were merged into others" if self.merged else ""
        parts = f", {len(self.partial)} are kept without a part of theirs" if self.partial else ""
        return f"{self.records} records{several}{fewer}{parts}" + (f", left out: {left}" if left else "")


@dataclass(frozen=True)
class Unfinished:
    """What a worker leaves that has done its share while parts of others are missing."""

    done: int  # parts that are there
    parts: int  # of all

    def __str__(self) -> str:
        return f"{self.done} of {self.parts} files are there; the worker that writes the last one ends it"


@dataclass(frozen=True)
class Share:
    """The share of one worker among several: every n-th part."""

    index: int = 0
    count: int = 1

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"shard={self.index}/{self.count}: must be i/n with 0 <= i < n, such as 0/8 to 7/8"
            )

    @classmethod
    def parse(cls, text: str) -> Share:
        """The share that ``i/n`` means, counted from 0.

        Raises:
          ValueError: the text means none.
        """
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if found is None:
            raise ValueError(f"shard={text!r}: must be i/n with 0 <= i < n, such as 0/8 to 7/8")
        return cls(int(found[1]), int(found[2]))


WHOLE = Share()


def convert(
    config: SourceConfig,
    source: Source,
    target: Path,
    *,
    per_file: int = 2000,
    num_threads: int = 2,
    split: Split | None = None,
    merge_turns: int = 1,
    orientation: Orientation = "shown",
    share: Share = WHOLE,
    progress: Callable[[int, int], None] = lambda done, total: None,
    comparing: Callable[[int, int], None] = lambda done, total: None,
) -> Report | Unfinished:
    """Writes a source as ArrayRecord files into a new folder; goes on where an earlier call was killed.

    The files are the same, byte for byte, however many workers share them. Workers with disks of their own
    write a ``DIR.partial`` each; with their files in one folder, one more call ends the conversion.

    Args:
      split: makes one or more samples of each; None leaves them whole.
      merge_turns: most turns of records about the same pictures that become one; 1 leaves them apart.
      orientation: which way up the source reads its pictures.
      share: which parts this worker writes.
      progress: called with the number of records that are done and of all that are this worker's.
      comparing: called like it while pictures are compared, which comes first.

    Raises:
      ValueError: the folder holds something else, or another source was begun there.
    """
    facts = {"source": repr(config), "stamp": stamp_of(source), "length": len(source), "per_file": per_file}
    facts |= {"split_texts": split is not None, "merge_turns": merge_turns if merge_turns > 1 else False}
    facts["orientation"] = orientation != "shown" and orientation
    folder = target.with_name(f"{target.name}.partial")
    if target.exists() and not (folder / REPORT).is_file():
        return _finished(target, config, facts)
    _claim(folder, config, facts)
    records = len(source)
    if merge_turns > 1:
        source = MergedSource(source, max_turns=merge_turns, num_threads=num_threads, progress=comparing)
    total = len(source)
    ranges = [range(start, min(start + per_file, total)) for start in range(0, total, per_file)]
    accounts = [folder / f"part-{number:05d}.json" for number in range(len(ranges))]
    mine = range(share.index, len(ranges), share.count)
    done, of_mine = 0, sum(len(ranges[number]) for number in mine)
    with ThreadPoolExecutor(num_threads) as pool:
        for number in mine:
            if not accounts[number].is_file() and not target.exists():
                _write_part(accounts[number], source, ranges[number], pool, split)
            done += len(ranges[number])
            progress(done, of_mine)
    there = sum(account.is_file() for account in accounts)
    if there < len(accounts) and not target.exists():
        return Unfinished(there, len(accounts))
    _conclude(folder, target, accounts, facts, merged=records - total)
    return _finished(target, config, facts)


def _conclude(
    folder: Path, target: Path, accounts: list[Path], facts: dict[str, Any], *, merged: int
) -> None:
    """Makes the folder of all parts; several workers may do so at once."""
    if not (folder / REPORT).is_file():
        try:
            parts = [json.loads(account.read_text(encoding="utf-8")) for account in accounts]
        except FileNotFoundError:  # another worker has made it meanwhile
            return
        report = Report(
            sum(part["records"] for part in parts),
            {index: message for part in parts for index, message in part["skipped"].items()},
            sum(part.get("split", 0) for part in parts),
            merged,
            {index: messages for part in parts for index, messages in part.get("partial", {}).items()},
        )
        with contextlib.suppress(FileNotFoundError):
            _write(folder / REPORT, {**dataclasses.asdict(report), **facts, "reasons": report.reasons})
    try:
        folders.move(folder, target, last=REPORT)
    except OSError:
        if not target.exists():
            raise


def _finished(target: Path, config: SourceConfig, facts: dict[str, Any]) -> Report:
    file = target / REPORT
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not _same(found, facts, config):
        raise ValueError(f"{target}: exists, and is not a conversion of this source as it is now")
    for left in (target / _SOURCE, *target.glob("part-*.json"), *target.glob("*.tmp")):
        left.unlink(missing_ok=True)
    more = (found.get("split", 0), found.get("merged", 0), found.get("partial", {}))
    return Report(found["records"], found["skipped"], *more)


def _claim(folder: Path, config: SourceConfig, facts: dict[str, Any]) -> None:
    """Makes the folder, or finds that it was begun for the same source."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / _SOURCE
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        if not _same(found, facts, config):
            raise ValueError(f"{folder}: was begun for another source or other files; delete it")
    _write(file, facts)


def _same(found: dict[str, Any], facts: dict[str, Any], config: SourceConfig) -> bool:
    """Whether a conversion, perhaps by an earlier version, was of this source in this way."""
    # Earlier versions say nothing of texts and pictures: they split and merged none.
    return {key: found.get(key, False) for key in facts} == _as_then(facts, config, found)


def _as_then(facts: dict[str, Any], config: SourceConfig, found: dict[str, Any]) -> dict[str, Any]:
    """The facts as the version that wrote those found would: fields it did not know have their defaults."""
    fields = dataclasses.fields(config)
    new = [f for f in fields if f"{f.name}=" not in str(found.get("source"))]
    if any(getattr(config, f.name) != f.default for f in new):
        return facts
    known = ", ".join(f"{f.name}={getattr(config, f.name)!r}" for f in fields if f not in new)
    return {**facts, "source": f"{type(config).__qualname__}({known})"}


def _write_part(
    place: Path, source: Source, records: range, pool: ThreadPoolExecutor, split: Split | None
) -> None:
    """Writes one file of records and then the account of it, each whole or not at all."""
    skipped: dict[int, str] = {}
    partial: dict[int, list[str]] = {}
    several = 0

    def encoded() -> Iterator[bytes]:
        nonlocal several
        for start in range(records.start, records.stop, _AHEAD):
            chunk = range(start, min(start + _AHEAD, records.stop))
            results = pool.map(lambda i: _encode(source, i, split), chunk)
            for index, result in zip(chunk, results, strict=True):
                if isinstance(result, BadSample):
                    skipped[index] = str(result)
                else:
                    records_of, left_out = result
                    several += len(records_of) > 1
                    if left_out:
                        partial[index] = left_out
                    yield from records_of

    file = place.with_suffix(array_records.ENDING)
    temporary = temporary_name(file)
    count = array_records.write_file(temporary, encoded())
    os.replace(temporary, file)
    if not count:
        file.unlink()
    _write(place, {"records": count, "skipped": skipped, "split": several, "partial": partial})


def _encode(source: Source, index: int, split: Split | None) -> tuple[list[bytes], list[str]] | BadSample:
    """The records that a sample becomes, and what is left out of it."""
    try:
        sample = source[index]
        parts = split(sample) if split else [sample]
        return [array_records.encode(part) for part in parts], [str(note) for note in sample.notes]
    except BadSample as error:
        return error


def _write(file: Path, content: dict[str, Any]) -> None:
    temporary = temporary_name(file)
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, file)
