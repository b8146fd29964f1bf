"""LLaVA-style conversation files: a JSON list, or JSON lines, of records with images beside them.

{"id": "7", "image": "a.png" | ["a.png", "b.png"] | absent, "lang": "en",
 "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl_jax.data.sample import DEFAULT_MAX_PIXELS, IMAGE_PLACEHOLDER, BadSample, FileImage, Sample, Turn

_YES_NO = frozenset({"yes", "no", "是", "否", "不是", "是的"})


@dataclass(frozen=True)
class LlavaConfig:
    """A conversation file (``.json`` or ``.jsonl``) and the folder its image paths are relative to."""

    name: str
    file: str  # relative to the data root
    root: str = ""  # image folder relative to the data root; empty means the folder of ``file``
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self):
        if not self.name:
            raise ValueError("name='' of a source: must not be empty")
        if not self.file.endswith((".json", ".jsonl")):
            raise ValueError(f"file={self.file!r} of source {self.name!r}: must end in .json or .jsonl")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels={self.max_pixels} of source {self.name!r}: must be at least 1")


class LlavaSource:
    """Random access to the records of one conversation file.

    Raises (on opening):
      ValueError: the whole file is unusable; one line with the file and the position.
    """

    def __init__(self, config: LlavaConfig, *, root: str = "."):
        self._config = config
        self._file = Path(root) / config.file
        self._folder = (Path(root) / config.root if config.root else self._file.parent).resolve()
        self._records = self._read()

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"LlavaSource({str(self._file)!r}, {len(self)} records)"

    def __getitem__(self, index: int) -> Sample:
        """The sample of record ``index``.

        Raises:
          BadSample: this record breaks a rule; the message names the sample, the file and the record.
        """
        record = self._records[index]
        if isinstance(record, str) and self._file.suffix == ".jsonl":
            record = self._parse_line(record, index)
        if not isinstance(record, dict):
            raise BadSample("not_an_object", f"{self._where('?', index)}: expected an object")
        where = self._where(record.get("id", index), index)
        system, turns = _conversation(record, where)
        names = record.get("image") or []
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise BadSample("bad_image_field", f"{where}: image must be a path or a list of paths")
        images = tuple(self._image(name, where) for name in names)
        placeholders = sum(t.question.count(IMAGE_PLACEHOLDER) for t in turns)
        if placeholders != len(images):
            message = f"{where}: {placeholders} {IMAGE_PLACEHOLDER} placeholders for {len(images)} images"
            raise BadSample("placeholder_mismatch", message)
        identity = str(record.get("id", f"{self._config.name}-{index}"))
        return Sample(id=identity, turns=turns, images=images, system=system)

    def _read(self) -> list[Any]:
        """The records; those of a JSON lines file stay text until they are asked for."""
        if not self._file.is_file():
            raise ValueError(f"source {self._config.name!r}: no such file {self._file}")
        try:
            text = self._file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._file}: not UTF-8 at byte {error.start}") from None
        if self._file.suffix == ".jsonl":
            return [line for line in text.split("\n") if line.strip()]
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self._file}: not JSON: {error}") from None
        if not isinstance(records, list):
            raise ValueError(f"{self._file}: expected a list of records, found {type(records).__name__}")
        return records

    def _parse_line(self, line: str, index: int) -> Any:
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadSample("not_json", f"{self._where('?', index)}: {error}") from None

    def _where(self, identity: Any, index: int) -> str:
        return f"sample {identity} ({self._file}, record {index})"

    def _image(self, name: str, where: str) -> FileImage:
        """The image file, provided it lies inside the image folder once links are followed."""
        try:
            path = (self._folder / name).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise BadSample("missing_image", f"{where}: bad path {name!r}: {error}") from None
        if Path(name).is_absolute() or not path.is_relative_to(self._folder):
            raise BadSample("outside_root", f"{where}: {name!r} leaves the image folder {self._folder}")
        return FileImage(path, where, self._config.max_pixels)


def _conversation(record: dict[str, Any], where: str) -> tuple[str, tuple[Turn, ...]]:
    """The system text and the question-answer pairs of a record."""
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise BadSample("bad_conversation", f"{where}: conversations must be a non-empty list")
    pairs = [_message(m, where) for m in messages]
    system = ""
    if pairs[0][0] == "system":
        system, pairs = pairs[0][1], pairs[1:]
    expected = ["human", "gpt"] * (len(pairs) // 2)
    if not pairs or [role for role, _ in pairs] != expected:
        raise BadSample("bad_conversation", f"{where}: expected human and gpt messages by turns")
    if IMAGE_PLACEHOLDER in system:
        raise BadSample("placeholder_mismatch", f"{where}: {IMAGE_PLACEHOLDER} in the system message")
    language = record.get("lang")
    language = language if isinstance(language, str) else ""
    turns = [
        Turn(question, answer, kind="yes/no" if _is_yes_no(answer) else "open", language=language)
        for (_, question), (_, answer) in zip(pairs[::2], pairs[1::2], strict=True)
    ]
    return system, tuple(turns)


def _message(message: Any, where: str) -> tuple[str, str]:
    role = message.get("from") if isinstance(message, dict) else None
    value = message.get("value") if isinstance(message, dict) else None
    if role not in ("human", "gpt", "system") or not isinstance(value, str):
        rule = "a message needs from: human, gpt or system, and a text value"
        raise BadSample("bad_conversation", f"{where}: {rule}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadSample("bad_conversation", f"{where}: half a surrogate pair in the text") from None
    return role, value


def _is_yes_no(answer: str) -> bool:
    return answer.strip().rstrip(".。!！").lower() in _YES_NO
