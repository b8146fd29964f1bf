"""Predictions as a file has them: one a line, appended as they are made: a stopped evaluation goes on.

    {"task": "docvqa", "asked": {...}, "commit": "..."}     what was asked of which model, in the first line
    {"id": "49153", "prediction": "0.28"}                      in the order of the questions

Files of other programs lack the first line, and may be a JSON list.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.experimental import multihost_utils

from vl_jax.runtime import disk, json_text

logger = logging.getLogger(__name__)

# Under which names programs write the id of a question, and what was said.
IDS = ("id", "question_id", "questionId", "image_id", "index")
PREDICTIONS = ("prediction", "answer", "caption")


class PredictionFile:
    """The predictions of one exam by one model, of which some may be there already.

    What another exam, model or setting left there is moved aside, with a line in the log. A last line that
    was not finished is dropped. Every process reads; the first one writes.

    Args:
      path: of the file; its folder is made. None: nothing is kept.
      task: name of the exam.
      asked: what the predictions follow from, as JSON values.
      ids: of the questions, in their order.
      writes: whether this process writes.
      notes: more for the first line, that may differ when the evaluation goes on.

    Attributes:
      done: rows by id, of the first questions.

    Raises:
      ValueError: a line in the file is no prediction of the question whose turn it is.
      OSError: it cannot be written.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        task: str,
        asked: Mapping[str, Any],
        ids: Sequence[str],
        writes: bool,
        notes: Mapping[str, Any],
    ):
        self._path = path if writes else None
        self.done: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        header = json.loads(json.dumps({"task": task, "asked": asked}))
        whole = _whole_lines(path)
        before = _header(path, whole[0]) if whole else {}
        other = _difference({k: before.get(k) for k in header}, header) if whole else ""
        self.done = {} if other else _rows(path, whole[1:], ids)
        if len(self.done) < len(ids):
            # Whoever is slower would read what the first one goes on to write.
            multihost_utils.sync_global_devices("predictions are read")
        if not writes:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if other:
            logger.warning(
                "%s is of another evaluation (%s); moved to %s", path, other, _set_aside(path).name
            )
        if other or not whole:
            line = json.dumps({**header, **notes}, ensure_ascii=False) + "\n"
            disk.write_text(path, line)
        else:
            os.truncate(path, sum(map(len, whole)))

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows, and waits until they are on the disk; OSError where there is no room."""
        kept = [dict(row) for row in rows]
        self.done |= {row["id"]: row for row in kept}
        if self._path is not None and kept:
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode()
            with disk.naming(self._path, needed=len(content)), self._path.open("ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())


def read_predictions(path: Path, *, task: str) -> dict[str, str]:
    """The predictions of a file by id of the question: one of ours, or a list or lines of another program.

    Raises:
      ValueError: the file is not there or is malformed, is of another task, has an id twice, or a row
        lacks id or text; names the line.
    """
    if not path.is_file():
        raise ValueError(f"no such file {path}")
    found: dict[str, str] = {}
    for where, row in _any_rows(path):
        if "task" in row and "asked" in row:
            if row["task"] != task:
                raise ValueError(f"{path} has predictions of task {row['task']!r}, not of {task!r}")
            continue
        name, text = _value(where, row, IDS), _value(where, row, PREDICTIONS)
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise ValueError(f"{where}: id {name!r}: expected a text or a whole number")
        if not isinstance(text, str):
            raise ValueError(f"{where}: prediction {text!r}: expected a text")
        if str(name) in found:
            raise ValueError(f"{where}: id {str(name)!r} is there twice")
        found[str(name)] = text
    return found


def _any_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSON list or of lines, each with where it is."""
    content = path.read_bytes()
    if content.lstrip()[:1] == b"[":
        try:
            values = json_text.parse(content, longest=1 << 32, most_marks=100_000_000)
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
        rows = [(f"{path}, item {number}", value) for number, value in enumerate(values)]
    else:
        lines = enumerate(content.splitlines(), start=1)
        rows = [
            (f"{path}, line {n}", _parsed(f"{path}, line {n}", line)) for n, line in lines if line.strip()
        ]
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, found {type(row).__name__}")
    return rows


def _value(where: str, row: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"{where}: has no {' or '.join(names)}; it has {', '.join(map(str, row)) or 'nothing'}")


def _parsed(where: str, line: bytes) -> Any:
    try:
        return json_text.parse(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None


def _whole_lines(path: Path) -> list[bytes]:
    """The lines of a file that are finished, with their ends; none without a file."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return lines[:-1] if lines and not lines[-1].endswith(b"\n") else lines


def _header(path: Path, line: bytes) -> dict[str, Any]:
    found = _parsed(f"{path}, line 1", line)
    if not isinstance(found, dict) or "task" not in found or "asked" not in found:
        raise ValueError(f"{path}, line 1: does not say what was asked; move the file away")
    return found


def _rows(path: Path, lines: Sequence[bytes], ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The predictions of the first questions."""
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines):
        where = f"{path}, line {number + 2}"
        row = _parsed(where, line)
        if not isinstance(row, dict) or not isinstance(row.get("prediction"), str):
            raise ValueError(f"{where}: no prediction; move the file away")
        expected = ids[number] if number < len(ids) else None
        if row.get("id") != expected:
            wanted = "the end of the file" if expected is None else f"id {expected!r}"
            raise ValueError(f"{where}: id {row.get('id')!r}, expected {wanted}; move the file away")
        found[row["id"]] = row
    return found


def _difference(before: Any, now: Any, path: str = "") -> str:
    """The first place at which two values of JSON differ; empty if they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*now, *before]):
            place = f"{path}.{key}" if path else key
            if found := _difference(before.get(key), now.get(key), place):
                return found
        return ""
    return "" if before == now else f"{path}: {str(before)[:60]!r} there, {str(now)[:60]!r} here"


def _set_aside(path: Path) -> Path:
    """Moves a file to the next free name beside it."""
    number = 1
    while (target := path.with_name(f"{path.stem}.{number}.aside")).exists():
        number += 1
    os.replace(path, target)
    return target
