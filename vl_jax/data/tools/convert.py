"""Any source to ArrayRecord files: every image decoded once, bad records left out, counted and listed.

A sound is kept as the picture that the source's config makes of it.

    DIR.partial/  part-00000.arrayrecord  part-00000.json  ...   --when all are there-->   DIR/
                  source.json                                                               report.json

A part is done when the account beside it is written, so a conversion that was killed goes on behind its last
part; and there is no ``DIR`` before everything is in it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vl_jax.data.picture import Orientation
from vl_jax.data.sample import BadSample, Sample, Source
from vl_jax.data.sources import array_records
from vl_jax.data.sources.build import SourceConfig, stamp_of
from vl_jax.data.sources.merged import MergedSource

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
    progress: Callable[[int, int], None] = lambda done, total: None,
    comparing: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Writes a source as ArrayRecord files into a new folder; goes on where an earlier call was killed.

    Args:
      split: makes one or more samples of each; None leaves them whole.
      merge_turns: most turns of records about the same pictures that become one; 1 leaves them apart.
      orientation: which way up the source reads its pictures.
      progress: called with the number of records that are done and of all.
      comparing: called like it while pictures are compared, which comes first.

    Raises:
      ValueError: the folder holds something else, or another source was begun there.
    """
    facts = {"source": repr(config), "stamp": stamp_of(source), "length": len(source), "per_file": per_file}
    facts |= {"split_texts": split is not None, "merge_turns": merge_turns if merge_turns > 1 else False}
    facts["orientation"] = orientation != "shown" and orientation
    if target.exists():
        return _finished(target, config, facts)
    folder = target.with_name(f"{target.name}.partial")
    _claim(folder, config, facts)
    records = len(source)
    if merge_turns > 1:
        source = MergedSource(source, max_turns=merge_turns, num_threads=num_threads, progress=comparing)
    total, parts = len(source), []
    with ThreadPoolExecutor(num_threads) as pool:
        for number, start in enumerate(range(0, total, per_file)):
            place = folder / f"part-{number:05d}.json"
            stop = min(start + per_file, total)
            if not place.is_file():
                _write_part(place, source, range(start, stop), pool, split)
            parts.append(json.loads(place.read_text(encoding="utf-8")))
            progress(stop, total)
    skipped = {index: message for part in parts for index, message in part["skipped"].items()}
    report = Report(
        sum(part["records"] for part in parts),
        skipped,
        sum(part.get("split", 0) for part in parts),
        records - total,
        {index: messages for part in parts for index, messages in part.get("partial", {}).items()},
    )
    _write(folder / REPORT, {**dataclasses.asdict(report), **facts, "reasons": report.reasons})
    for file in (folder / _SOURCE, *folder.glob("part-*.json")):
        file.unlink()
    os.replace(folder, target)
    return report


def _finished(target: Path, config: SourceConfig, facts: dict[str, Any]) -> Report:
    file = target / REPORT
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not _same(found, facts, config):
        raise ValueError(f"{target}: exists, and is not a conversion of this source as it is now")
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
    temporary = file.with_suffix(".tmp")
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
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, file)
