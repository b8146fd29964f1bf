"""The messages of a record, in whatever dialect they are: who says what, about which files.

See ``conversation`` for the dialects.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from vl_jax.data.images.clips import VIDEO_PLACEHOLDER
from vl_jax.data.sample import IMAGE_PLACEHOLDER, REMOTE, BadSample, Note
from vl_jax.data.sources.keys import meant, unread, weight_of

Kind = Literal["image", "audio"]

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}
AUDIO_PLACEHOLDER = "<audio>"
MARKS = {"image": IMAGE_PLACEHOLDER, "audio": AUDIO_PLACEHOLDER}
ANY_MARK = re.compile("|".join(MARKS.values()))
# Types of the parts of a message, and what they bring.
_PARTS: dict[str, Kind] = {
    "image": "image",
    "image_url": "image",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}
# What a record of each dialect is told by, and all the keys it is made of.
DIALECTS = {
    "conversations": ("conversations",),
    "messages": ("messages",),
    "question": ("question", "answer"),
    "instruction": ("instruction", "input", "output", "history"),
    "text": ("text",),
    "caption": ("caption",),
}
_WEIGHTS = ("weight", "train", "training", "loss")  # of a message
_READ_OF_MESSAGE = frozenset({"from", "value", "role", "content", "id", *_WEIGHTS})
# What others call the keys that name pictures, sounds and conversations.
ALIASES = {
    "image": ("img", "imgs", "image_path", "img_path", "image_file", "picture", "photo", "path", "file_name"),
    "audio": ("sound", "sounds", "audio_path", "wav", "speech"),
    "conversations": ("conversation", "dialogue", "dialog", "chat", "turns"),
}


class Medium(NamedTuple):
    """A file that a record names."""

    kind: Kind
    name: str


@dataclass
class Talk:
    """(role, text) and weight of every message, the files that messages name, and what is not read."""

    pairs: list[tuple[str, str]]
    weights: list[float]
    media: list[Medium] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


def dialect_of(record: Mapping[str, Any]) -> str:
    """The key by which a record shows its dialect; empty if it has none."""
    return next((key for key in DIALECTS if record.get(key) is not None), "")


def read_messages(record: dict[str, Any], dialect: str, where: str, count: dict[str, int]) -> Talk:
    """What the messages of a record say."""
    if dialect in ("text", "caption"):
        text = checked_text(record[dialect], where)
        return Talk([("user", _marked("", count)), ("assistant", text)], [1.0, 1.0])
    if dialect == "question":
        question = checked_text(record["question"], where)
        question = _marked(question, _to_mark(record, [question], count))
        answer = checked_text(record.get("answer"), f"{where}: answer")
        return Talk([("user", question), ("assistant", answer)], [1.0, 1.0])
    if dialect == "instruction":
        pairs = _instruction(record, where, count)
        return Talk(pairs, [1.0] * len(pairs))
    if not dialect:
        rule = f"expected one of {', '.join(DIALECTS)}"
        found = meant(record, tuple(DIALECTS), ALIASES["conversations"])
        raise BadSample("bad_conversation", f"{where}: no conversation in it, {rule}; {found}")
    messages = record[dialect]
    if not isinstance(messages, list) or not messages:
        raise BadSample("bad_conversation", f"{where}: {dialect} must be a non-empty list")
    talk = Talk([], [])
    for number, message in enumerate(messages):
        place = f"{where}, {dialect}[{number}]"
        message = message if isinstance(message, dict) else {}
        who, what = ("from", "value") if "from" in message or "value" in message else ("role", "content")
        role = message.get(who)
        if not isinstance(role, str) or role not in _ROLES:
            rule = f"a message needs {who}: {', '.join(_ROLES)}"
            found = meant(message, (who, what))
            raise BadSample("bad_conversation", f"{place}: {rule}; found {str(role)[:40]!r}; {found}")
        weight, notes = weight_of(message, _WEIGHTS, place)
        if _ROLES[role] != "assistant" and any(message.get(name) for name in _WEIGHTS):
            rule = "only answers have a weight"
            notes.append(
                Note("weight_not_read", f"{place}: the weight of a message of {role} is not read: {rule}")
            )
        talk.pairs.append((_ROLES[role], _content(message.get(what), place, talk.media)))
        talk.weights.append(weight)
        talk.notes += [*notes, *unread(message, _READ_OF_MESSAGE, place)]
    return talk


def _instruction(record: dict[str, Any], where: str, count: dict[str, int]) -> list[tuple[str, str]]:
    """The messages of a record with an instruction; what was said before it comes first."""
    before = record.get("history") or []
    if not isinstance(before, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in before):
        rule = "history must be a list of pairs of a question and an answer"
        raise BadSample("bad_conversation", f"{where}: {rule}")
    asked = (record["instruction"], record.get("input") or "")
    asked = "\n".join(text for text in (checked_text(t, where) for t in asked) if text)
    said = [*before, [asked, record.get("output")]]
    questions = [checked_text(question, where) for question, _ in said]
    if not any(ANY_MARK.search(question) for question in questions):
        questions[0] = _marked(questions[0], _to_mark(record, questions, count))
    answers = [checked_text(answer, f"{where}: output") for _, answer in said]
    pairs = zip(questions, answers, strict=True)
    return [message for q, a in pairs for message in (("user", q), ("assistant", a))]


def _to_mark(record: Mapping[str, Any], questions: Sequence[str], count: dict[str, int]) -> dict[str, int]:
    """How many of each kind have no mark yet, where no question has any: a clip may have its own."""
    placed = "frames" in record and any(VIDEO_PLACEHOLDER in question for question in questions)
    return {**count, "image": 0} if placed else count


def _marked(question: str, count: dict[str, int]) -> str:
    """The question with marks in front for what it has none for, images first."""
    for kind, mark in reversed(MARKS.items()):
        if mark not in question:
            question = f"{mark}\n" * count[kind] + question
    return question


def _content(content: Any, where: str, media: list[Medium]) -> str:
    """The text of a message, given as one or in parts; files that parts name are added to the list."""
    if not isinstance(content, list):
        return checked_text(content, where)
    pieces = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            pieces.append(checked_text(part.get("text"), where))
            continue
        if not isinstance(kind, str) or kind not in _PARTS:
            raise BadSample("bad_conversation", f"{where}: a part of type {str(kind)[:40]!r}")
        pieces.append(f"{MARKS[_PARTS[kind]]}\n")
        name = part.get(kind)
        if isinstance(name, dict):
            name = "data:" if "data" in name else name.get("url")
        if name is not None and (not isinstance(name, str) or name.partition(":")[0] in REMOTE):
            rule = f"{kind} must be a path, not {str(name)[:40]!r}: nothing is fetched"
            raise BadSample(f"bad_{_PARTS[kind]}_field", f"{where}: {rule}, save it as a file and name that")
        media += [] if name is None else [Medium(_PARTS[kind], name)]
    return "".join(pieces)


def checked_text(value: Any, where: str, *, reason: str = "bad_conversation") -> str:
    """The value if it is a text that can be written down.

    Raises:
      BadSample: it is not; with the reason.
    """
    if not isinstance(value, str):
        message = f"{where}: expected a text, found {type(value).__name__}"
        raise BadSample(reason, message)
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError:
        raise BadSample(reason, f"{where}: half a surrogate pair in the text") from None
    return value
