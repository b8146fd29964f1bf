"""Records to conversations, whatever file they come from; the dialect shows in the record's own keys.

    {"conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A cat."}]}
    {"messages": [{"role": "user", "content": "<image>\\nWhat is it?"}, {"role": "assistant", ...}]}
    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ...}]}, ...]}
    {"question": "What is it?", "answer": "A cat."}         every image stands before the question
    {"text": "Once upon a time ..."}                        read as it is; with images it is their caption

Beside these may stand ``id``, ``image`` or ``images`` (paths) or ``frames`` (see ``clips``), ``audio`` or
``audios`` (paths of sounds, marked by ``<audio>``: see ``audio``), ``lang``, and ``boxes``, which ``<box:0>``
in an answer refers to: ``[{"label": "cat", "bbox": [x0, y0, x1, y1]}]`` in pixels of ``width`` x ``height``,
which say whether the picture was turned as EXIF says when they were drawn (see ``frames``).
Fields that a source's config names become labels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from vl_jax.data.images.clips import mark_frames
from vl_jax.data.images.frames import DeclaredFrame, declared_frame, frames_of
from vl_jax.data.picture import turn_corners
from vl_jax.data.sample import IMAGE_PLACEHOLDER, TEXT, BadSample, Box, Image, Note, Turn
from vl_jax.data.text.grounding import GRID, Corners, rewrite, to_grid

Kind = Literal["image", "audio"]

_YES_NO = frozenset({"yes", "no", "是", "否", "不是", "是的"})
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
AUDIO_PLACEHOLDER = "<audio>"
_MARKS = {"image": IMAGE_PLACEHOLDER, "audio": AUDIO_PLACEHOLDER}
_ANY_MARK = re.compile("|".join(_MARKS.values()))
# Types of the parts of a message, and what they bring.
_PARTS: dict[str, Kind] = {
    "image": "image",
    "image_url": "image",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}
_BOX_MARK = re.compile(r"<box:(\d{1,6})>")
_WRITTEN = "<|det|>"  # begins boxes that are written on the grid already
ANSWER = "answer"  # the label that is what the first turn answers, whether or not a field is called so
_DIALECTS = ("conversations", "messages", "question", "text")


class Medium(NamedTuple):
    """A file that a record names."""

    kind: Kind
    name: str


@dataclass(frozen=True)
class Conversation:
    """What a record says; ``media`` are the files it names, in the order of their marks.

    Every mark in the turns is ``<image>``: a sound is seen as a picture too.
    """

    id: str
    turns: tuple[Turn, ...]
    media: tuple[Medium, ...]
    system: str = ""
    labels: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()


def parse(
    record: Any,
    where: str,
    *,
    default_id: str,
    num_images: int | None = None,
    labels: Sequence[str] = (),
    caption: bool = False,
    images: Callable[[Sequence[Medium], str], Sequence[Image]] = lambda media, where: (),
) -> Conversation:
    """Reads a record.

    Args:
      where: "file, record N", for messages.
      default_id: of a record without one.
      num_images: how many images come with the record where it does not name them.
      labels: fields that are kept as labels; ``answer`` is the answer of the first turn.
      caption: the only answer is kept as a text about the pictures, and its question is not.
      images: opens the pictures of a record, which are asked for their size where boxes are on them; with
        the place for messages.

    Raises:
      BadSample: the record breaks a rule; one line that says where, and which.
    """
    if not isinstance(record, dict):
        raise BadSample("not_an_object", f"sample ? ({where}): expected an object")
    identity = str(record.get("id", default_id))
    where = f"sample {identity[:80]} ({where})"
    if (record.get("video") or record.get("videos")) and "frames" not in record:
        raise BadSample("unsupported_video", f"{where}: videos are not decoded; name the frames of a clip")
    named = [*_named(record, "image", where), *_named(record, "audio", where)]
    pairs, inline = _messages(record, where, _count(named, num_images))
    media = named + inline
    count = _count(media, num_images)
    if num_images is not None and count["audio"]:
        raise BadSample("bad_audio_field", f"{where}: sounds are read beside JSON and JSONL files only")
    if "frames" in record and count["image"]:
        pairs = mark_frames(pairs, count["image"])
    system = ""
    if pairs and pairs[0][0] == "system":
        system, pairs = pairs[0][1], pairs[1:]
    if not pairs or [role for role, _ in pairs] != ["user", "assistant"] * (len(pairs) // 2):
        raise BadSample("bad_conversation", f"{where}: expected messages of user and assistant by turns")
    _check_marks(system, [text for role, text in pairs if role == "user"], count, where)
    if count["audio"]:
        pairs, media = _in_order(pairs, media)
    boxes = _boxes(record, where)
    pictures = [medium for medium in media if medium.kind == "image"]
    frame, notes = _frame(record, [text for _, text in pairs], lambda: images(pictures, where), where)
    language = record.get("lang")
    language = language if isinstance(language, str) else ""
    turns = [
        _turn(_turned(question, frame), _turned(answer, frame), language, boxes, frame, where)
        for (_, question), (_, answer) in zip(pairs[::2], pairs[1::2], strict=True)
    ]
    known = labels_of({**record, ANSWER: turns[0].answer}, labels, where) if labels else {}
    turns = [_captioned(turns, where)] if caption else turns
    return Conversation(identity, tuple(turns), tuple(media), system, known, notes)


def labels_of(record: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, Any]:
    """Some fields of a record, without those that are null.

    Raises:
      BadSample: the record has no such field.
    """
    missing = [name for name in names if name not in record]
    if missing:
        raise BadSample("missing_field", f"{where}: no field {missing[0]!r}")
    return {name: record[name] for name in names if record[name] is not None}


def _captioned(turns: Sequence[Turn], where: str) -> Turn:
    """The only turn without its question; its pictures stay."""
    if len(turns) != 1:
        raise BadSample("bad_conversation", f"{where}: {len(turns)} answers, a caption is the only one")
    marks = f"{IMAGE_PLACEHOLDER}\n" * turns[0].question.count(IMAGE_PLACEHOLDER)
    return replace(turns[0], question=marks, kind=TEXT)


def _named(record: dict[str, Any], kind: Kind, where: str) -> list[Medium]:
    """The files that a record itself names."""
    names = record.get(kind) or record.get(f"{kind}s") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise BadSample(f"bad_{kind}_field", f"{where}: {kind} must be a path or a list of paths")
    return [Medium(kind, name) for name in names]


def _count(media: Sequence[Medium], num_images: int | None) -> dict[str, int]:
    """How many there are of each kind; images that come with a record without names count as well."""
    count = {kind: sum(medium.kind == kind for medium in media) for kind in _MARKS}
    if num_images is not None and not count["image"]:
        count["image"] = num_images
    return count


def _check_marks(system: str, questions: Sequence[str], count: dict[str, int], where: str) -> None:
    for kind, mark in _MARKS.items():
        if mark in system:
            raise BadSample("placeholder_mismatch", f"{where}: {mark} in the system message")
        marks = sum(text.count(mark) for text in questions)
        if marks != count[kind]:
            message = f"{where}: {marks} {mark} placeholders for {count[kind]} {kind}s"
            raise BadSample("placeholder_mismatch", message)


def _in_order(
    pairs: Sequence[tuple[str, str]], media: Sequence[Medium]
) -> tuple[list[tuple[str, str]], list[Medium]]:
    """The messages with one kind of mark only, and the files in the order of the marks."""
    files = {mark: iter([m for m in media if m.kind == kind]) for kind, mark in _MARKS.items()}
    marks = [mark for role, text in pairs if role == "user" for mark in _ANY_MARK.findall(text)]
    said = [
        (role, _ANY_MARK.sub(IMAGE_PLACEHOLDER, text) if role == "user" else text) for role, text in pairs
    ]
    return said, [next(files[mark]) for mark in marks]


def _messages(
    record: dict[str, Any], where: str, count: dict[str, int]
) -> tuple[list[tuple[str, str]], list[Medium]]:
    """(role, text) of every message, and the files that messages name themselves."""
    dialect = next((key for key in _DIALECTS if record.get(key) is not None), None)
    if dialect == "text":
        text = checked_text(record["text"], where)
        return [("user", _marked("", count)), ("assistant", text)], []
    if dialect == "question":
        question = _marked(checked_text(record["question"], where), count)
        return [("user", question), ("assistant", checked_text(record.get("answer"), where))], []
    messages = record[dialect] if dialect else None
    if not isinstance(messages, list) or not messages:
        message = f"{where}: {dialect or _DIALECTS[0]} must be a non-empty list"
        raise BadSample("bad_conversation", message)
    who, what = ("from", "value") if dialect == "conversations" else ("role", "content")
    media: list[Medium] = []
    pairs = []
    for message in messages:
        role = message.get(who) if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in _ROLES:
            rule = f"a message needs {who}: {', '.join(_ROLES)}"
            raise BadSample("bad_conversation", f"{where}: {rule}; found {str(role)[:40]!r}")
        pairs.append((_ROLES[role], _content(message.get(what), where, media)))
    return pairs, media


def _marked(question: str, count: dict[str, int]) -> str:
    """The question with marks in front for what it has none for, images first."""
    for kind, mark in reversed(_MARKS.items()):
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
        if kind not in _PARTS:
            raise BadSample("bad_conversation", f"{where}: a part of type {str(kind)[:40]!r}")
        pieces.append(f"{_MARKS[_PARTS[kind]]}\n")
        name = part.get(kind)
        if isinstance(name, dict):
            name = "data:" if "data" in name else name.get("url")
        if name is not None and (not isinstance(name, str) or name.partition(":")[0] in REMOTE):
            message = f"{where}: {kind} must be a path, not {str(name)[:40]!r}"
            raise BadSample(f"bad_{_PARTS[kind]}_field", message)
        media += [] if name is None else [Medium(_PARTS[kind], name)]
    return "".join(pieces)


# How names begin that are no paths.
REMOTE = ("http", "https", "data", "file", "s3", "gs")


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


def _frame(
    record: dict[str, Any], texts: Sequence[str], pictures: Callable[[], Sequence[Image]], where: str
) -> tuple[DeclaredFrame | None, tuple[Note, ...]]:
    """The frame that a record's boxes are in, and what is odd about it; None where boxes need no change."""
    size = [record.get(name) for name in ("width", "height")]
    whole = [n for n in size if isinstance(n, int) and 0 < n < 10**6]
    declared = (whole[0], whole[1]) if len(whole) == 2 else None
    marked = declared is not None and any(_BOX_MARK.search(text) for text in texts)
    if not marked and not any(_WRITTEN in text for text in texts):
        return None, ()
    frames = frames_of(pictures())
    if declared is None and not frames:
        return None, ()
    try:
        frame = declared_frame(declared, frames, where)
    except BadSample as error:
        if marked or error.reason != "wrong_size":
            raise
        return None, (Note(error.reason, str(error)),)  # the grid that texts are on has no size
    return frame, frame.notes(where) if marked else ()


def _turned(text: str, frame: DeclaredFrame | None) -> str:
    """A text whose boxes, where it has some on the grid, are on the picture as it is read."""
    if frame is None or frame.turn == 1 or _WRITTEN not in text:
        return text

    def move(corners: Corners) -> Corners:
        return to_grid(turn_corners(corners, frame.turn, (GRID, GRID)), GRID, GRID)

    return rewrite(text, move)


def _turn(
    question: str, answer: str, language: str, boxes: list[Box], frame: DeclaredFrame | None, where: str
) -> Turn:
    """A turn; ``<box:i>`` in the answer becomes the box on the grid of 0..999."""
    kind = "yes/no" if answer.strip().rstrip(".。!！").lower() in _YES_NO else "open"
    kind = kind if question.strip() else TEXT
    numbers = [int(n) for n in _BOX_MARK.findall(answer)] if "<box:" in answer else []
    if not numbers:
        return Turn(question, answer, kind=kind, language=language)
    if frame is None or max(numbers) >= len(boxes):
        size = "no width and height" if frame is None else f"{frame.declared[0]}x{frame.declared[1]}"
        message = f"{where}: <box:{max(numbers)}> of {len(boxes)} boxes, in a picture of {size}"
        raise BadSample("bad_box", message)
    width, height = frame.declared

    def written(match: re.Match[str]) -> str:
        corners = to_grid(frame.place(boxes[int(match[1])].corners), *frame.size)
        return f"<|det|>[[{', '.join(map(str, corners))}]]<|/det|>"

    for box in (boxes[n] for n in numbers):
        x0, y0, x1, y1 = box.corners
        if not (x0 <= width and y0 <= height and x1 >= 0 and y1 >= 0):
            raise BadSample(
                "bad_box", f"{where}: a box at {box.corners} is outside its {width}x{height} picture"
            )
    named = tuple(Box(boxes[n].label, frame.place(boxes[n].corners)) for n in numbers)
    return Turn(question, _BOX_MARK.sub(written, answer), kind="grounding", language=language, boxes=named)


def _boxes(record: dict[str, Any], where: str) -> list[Box]:
    found = record.get("boxes") or []
    if not isinstance(found, list):
        raise BadSample("bad_box", f"{where}: boxes must be a list")
    return [_box(box, index, where) for index, box in enumerate(found)]


def _box(box: Any, index: int, where: str) -> Box:
    corners = box.get("bbox") if isinstance(box, dict) else None
    corners = corners if isinstance(corners, list) else []
    numbers = all(type(c) in (int, float) for c in corners)
    if len(corners) != 4 or not numbers or not all(abs(c) < 1e6 for c in corners):  # NaN is not less
        raise BadSample("bad_box", f"{where}: boxes[{index}] needs bbox: four finite numbers")
    x0, y0, x1, y1 = (float(c) for c in corners)
    if x0 > x1 or y0 > y1:
        raise BadSample("bad_box", f"{where}: boxes[{index}] needs x0 <= x1 and y0 <= y1")
    return Box(str(box.get("label", "")), (x0, y0, x1, y1))
