"""The files of an exam's folder: found by name, read piece by piece, never left by a path."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vl_jax.data.files.json_reader import JsonReader
from vl_jax.data.files.spans import map_file
from vl_jax.data.sample import BadSample, path_in
from vl_jax.data.sources.llava import parse_line


@dataclass(frozen=True)
class ExamEntry:
    """One question as a file has it, and what belongs to its answer."""

    id: str
    question: str
    references: tuple[str, ...]  # what people answered; all of them, the first one to be learnt
    image: str | bytes  # path in the folder, or an encoded picture
    cluster: str  # questions of one cluster hang together: those about one picture
    facts: Mapping[str, Any] = field(default_factory=dict)  # whatever else prompt and metric need
    groups: Mapping[str, str] = field(default_factory=dict)  # group by kind of group


class ExamFolder:
    """A folder, and which of its files were read.

    Args:
      path: of the folder.
      name: what messages call it.

    Raises:
      ValueError: there is no such folder.
    """

    def __init__(self, path: Path, name: str):
        if not path.is_dir():
            raise ValueError(f"{name}: no such folder {path}")
        self.path, self.name, self.read = path.resolve(), name, list[Path]()

    def find(self, split: str, *patterns: str) -> Path:
        """The only file that one of some patterns means, the first pattern that means any.

        Args:
          split: stands in the place of ``{split}`` in a pattern.

        Raises:
          ValueError: no pattern means a file, or one means several.
        """
        named = [_filled(pattern, split) for pattern in patterns]
        for pattern in named:
            found = sorted(p for p in self.path.glob(pattern) if p.is_file())
            if len(found) > 1:
                names = ", ".join(str(p.relative_to(self.path)) for p in found[:6])
                raise ValueError(f"{self.name}: {self.path} has {names}; choose one with split (--split)")
            if found:
                return self._kept(found[0])
        raise ValueError(f"{self.name}: {self.path} has no file {' or '.join(named)}")

    def find_all(self, split: str, *patterns: str) -> list[Path]:
        """All files that some patterns mean; ValueError if there is none."""
        named = [_filled(pattern, split) for pattern in patterns]
        found = {p for pattern in named for p in self.path.glob(pattern) if p.is_file()}
        if not found:
            raise ValueError(f"{self.name}: {self.path} has no file {' or '.join(named)}")
        return [self._kept(p) for p in sorted(found)]

    def items(self, file: Path, key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        """The objects of a list, each with where it is, for messages.

        Args:
          key: the list is the value of that key of an object; empty: it is the file.

        Raises:
          ValueError: the file is not JSON, or holds something else.
        """
        reader = JsonReader(file, map_file(file))
        found = not key
        if not key:
            yield from self._objects(file, reader, key)
        elif reader.peek() != "{":
            raise ValueError(f"{file}: expected an object with {key!r}")
        else:
            for name in reader.fields():
                if name != key:
                    reader.value()
                    continue
                found = True
                yield from self._objects(file, reader, key)
        reader.end()
        if not found:
            raise ValueError(f"{file}: has no {key!r}")

    def _objects(self, file: Path, reader: JsonReader, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if reader.peek() != "[":
            raise ValueError(f"{file}: expected a list{f' under {key!r}' if key else ''}")
        for number, item in enumerate(reader.items()):
            where = f"{file}, {key or 'item'} {number}"
            if not isinstance(item.value, dict):
                raise ValueError(f"{where}: expected an object, found {type(item.value).__name__}")
            yield where, item.value

    def json_lines(self, file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        """The objects of a file with one a line, each with where it is.

        Raises:
          ValueError: a line is no object of JSON.
        """
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                where = f"{file}, line {number}"
                try:
                    value = parse_line(line.strip(), where)
                except BadSample as error:
                    raise ValueError(str(error)) from None
                if not isinstance(value, dict):
                    raise ValueError(f"{where}: expected an object, found {type(value).__name__}")
                yield where, value

    def table(self, file: Path) -> Iterator[tuple[str, dict[str, str]]]:
        """The rows of a table of tab-separated cells under a header, each with where it is.

        Raises:
          ValueError: a row has not as many cells as the header, or a cell is broken.
        """
        # A picture in a cell is longer than the reader of tables takes by default.
        before = csv.field_size_limit(min(sys.maxsize, 1 << 30))
        try:
            with file.open(encoding="utf-8-sig", newline="") as opened:
                reader = csv.DictReader(opened, delimiter="\t", strict=True)
                for row in reader:
                    where = f"{file}, line {reader.line_num}"
                    if None in row or None in row.values():
                        raise ValueError(f"{where}: expected {len(reader.fieldnames or ())} cells")
                    yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: no table of tab-separated cells: {error}") from None
        finally:
            csv.field_size_limit(before)

    def image(self, where: str, *names: str) -> str:
        """The first of some paths at which there is a file, relative to the folder.

        Raises:
          ValueError: there is none, or a path leads out of the folder.
        """
        for name in names:
            try:
                path = path_in(self.path, name, where, kind="image")
            except BadSample as error:
                raise ValueError(str(error)) from None
            if path.is_file():
                return name
        raise ValueError(f"{where}: no image file {' or '.join(names)} in {self.path}")

    def _kept(self, file: Path) -> Path:
        if not file.resolve().is_relative_to(self.path):
            raise ValueError(f"{self.name}: {file} leads out of {self.path} by a link")
        if file not in self.read:
            self.read.append(file)
        return file


def _filled(pattern: str, split: str) -> str:
    """A pattern with the split in its place; without one anything may stand there."""
    return re.sub(r"\*+", "*", pattern.replace("{split}", split or "*"))


def field_of(where: str, item: Mapping[str, Any], *names: str) -> Any:
    """The value of the first of some fields that an object has.

    Raises:
      ValueError: it has none of them.
    """
    for name in names:
        if item.get(name) is not None:
            return item[name]
    raise ValueError(f"{where}: has no {' or '.join(map(repr, names))}; it has {', '.join(map(str, item))}")


def text_of(where: str, item: Mapping[str, Any], *names: str) -> str:
    """The same of a text that is not empty; a number is written out."""
    value = field_of(where, item, *names)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError(f"{where}: {names[0]}={str(value)[:80]!r}: expected a text")
    return str(value)


def texts_of(where: str, item: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    """The same of one text or a list of texts, at least one."""
    value = field_of(where, item, *names)
    texts = value if isinstance(value, list) else [value]
    if not texts or any(isinstance(t, bool) or not isinstance(t, str | int | float) for t in texts):
        raise ValueError(f"{where}: {names[0]}={str(value)[:80]!r}: expected one text or more")
    return tuple(map(str, texts))
