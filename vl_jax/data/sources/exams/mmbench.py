"""MMBench: questions with options, each asked under every rotation of them.

    MMBench_DEV_EN.tsv, mmbench_dev_20230712.tsv ...    a header and tab-separated cells
        index  question  hint  A  B  C  D  answer  category  image  l2-category  split

``image`` is a picture in base64, or the index of the row that has it. Rotation r of question q has the index
q + r * 10^6: files that hold them are read as they are, and of the others they are made here, where option
B becomes A, and so on. The answers of the test split are at the server only. Source: Liu et al., "MMBench",
2023; github.com/open-compass/MMBench.
"""

from __future__ import annotations

import base64
import binascii
import string
from collections.abc import Iterator, Mapping

from vl_jax.data.sources.exams.folder import ExamEntry, ExamFolder, text_of

ROTATION = 10**6  # by which the indices of two rotations of a question differ
_LONGEST_INDEX = 64  # characters: a longer cell is a picture


def read(folder: ExamFolder, split: str) -> Iterator[ExamEntry]:
    """The questions under all rotations, those of a question one after another."""
    file = folder.find(split, "{split}.tsv", "*{split}*.tsv")
    rows: dict[int, tuple[str, dict[str, str]]] = {}
    for where, row in folder.table(file):
        index = _index(where, text_of(where, row, "index"))
        if index in rows:
            raise ValueError(f"{where}: index={index} is there twice")
        rows[index] = (where, row)
    pictures = {
        index: _decoded(where, row["image"])
        for index, (where, row) in rows.items()
        if len(text_of(where, row, "image")) > _LONGEST_INDEX
    }
    rotated = any(index >= ROTATION for index in rows)
    for index in sorted(rows, key=lambda index: (index % ROTATION, index)):
        where, row = rows[index]
        owner = index if index in pictures else _index(where, row["image"])
        if owner not in pictures:
            raise ValueError(f"{where}: image={owner}: no row of that index has a picture")
        options = _options(where, row)
        turns = (0,) if rotated else range(len(options))
        for turn in turns:
            yield _entry(where, row, index, turn, options, pictures[owner], str(owner % ROTATION))


def _index(where: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"{where}: index={text[:40]!r}: expected a whole number")
    return int(text)


def _decoded(where: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{where}: image: no base64: {error}") from None


def _options(where: str, row: Mapping[str, str]) -> list[str]:
    """The texts of the options; cells behind the last one are empty, or say nan."""
    cells = [row.get(letter, "").strip() for letter in string.ascii_uppercase]
    found = [cell for cell in cells if cell and cell != "nan"]
    if len(found) < 2 or cells[: len(found)] != found:
        raise ValueError(f"{where}: expected two options or more, from A on without a gap")
    return found


def _entry(
    where: str, row: Mapping[str, str], index: int, turn: int, options: list[str], picture: bytes, owner: str
) -> ExamEntry:
    letters = string.ascii_uppercase[: len(options)]
    answer = text_of(where, row, "answer").strip()
    if answer not in letters:
        raise ValueError(f"{where}: answer={answer!r}: expected one of {', '.join(letters)}")
    right = letters[(letters.index(answer) - turn) % len(letters)]
    turned = dict(zip(letters, options[turn:] + options[:turn], strict=True))
    hint = (row.get("hint") or "").strip()
    return ExamEntry(
        id=str(index + turn * ROTATION),
        question=text_of(where, row, "question"),
        references=(right,),
        image=picture,
        cluster=owner,
        facts={
            "whole": str(index % ROTATION),
            "options": turned,
            "hint": "" if hint == "nan" else hint,
            "target": right,
        },
        groups={"category": row.get("l2-category") or row.get("category") or ""},
    )
