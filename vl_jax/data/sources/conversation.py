"""Records to conversations, whatever file they come from; the dialect shows in the record's own keys.

    {"conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A cat."}]}
    {"messages": [{"role": "user", "content": "<image>\\nWhat is it?"}, {"role": "assistant", ...}]}
    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ...}]}, ...]}
    {"question": "What is it?", "answer": "A cat."}         every image stands before the question
    {"instruction": "What is it?", "input": "In a word.", "output": "A cat.", "history": [["Hi", "Hello"]]}
    {"text": "Once upon a time ..."}                        read as it is; with images it is their caption
    {"caption": "A cat."}                                   the same

Beside these may stand ``id``, ``image`` or ``images`` (paths) or ``frames`` (see ``clips``), ``audio`` or
``audios`` (paths of sounds, marked by ``<audio>``: see ``audio``), ``system`` (or a first message of that
role, which comes first), ``lang``, and ``boxes``, which ``<box:0>``
in an answer refers to: ``[{"label": "cat", "bbox": [x0, y0, x1, y1]}]`` in pixels of ``width`` x ``height``,
which say whether the picture was turned as EXIF says when they were drawn (see ``frames``).
``weight``, of a record or of an answer, is what its tokens count in the loss; ``train``, ``training`` and
``loss`` of an answer are other names for it. Fields that a source's config names become labels. A note says
what of a record is not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vl_jax.data.images.clips import mark_frames
from vl_jax.data.images.frames import DeclaredFrame, declared_frame, frames_of
from vl_jax.data.picture import turn_corners
from vl_jax.data.sample import (
    IMAGE_PLACEHOLDER,
    TEXT,
    BadSample,
    Box,
    Image,
    Note,
    Turn,
    in_one_line,
)
from vl_jax.data.sources.keys import meant, unread, weight_of
from vl_jax.data.sources.messages import (
    ALIASES,
    ANY_MARK,
    DIALECTS,
    MARKS,
    Kind,
    Medium,
    checked_text,
    dialect_of,
    read_messages,
)
from vl_jax.data.text.grounding import GRID, Corners, rewrite, to_grid

_YES_NO = frozenset({"yes", "no", "是", "否", "不是", "是的"})
_BOX_MARK = re.compile(r"<box:(\d{1,6})>")
_WRITTEN = "<|det|>"  # begins boxes that are written on the grid already
ANSWER = "answer"  # the label that is what the first turn answers, whether or not a field is called so
_SYSTEM = ("system", "system_prompt", "system_message")
_NAMES = {"image": ("image", "images"), "audio": ("audio", "audios")}  # keys that name files
_READ = frozenset(
    "id image images audio audios frames video videos lang boxes width height weight".split()
) | set(_SYSTEM)


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


def identity_of(record: Mapping[str, Any], default: str) -> str:
    """The id of a record, which can be printed in a line; the default if it has none."""
    given = record.get("id")
    return in_one_line(default if given is None or given == "" else str(given))


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
    identity = identity_of(record, default_id)
    where = f"sample {identity[:80]} ({where})"
    if (record.get("video") or record.get("videos")) and "frames" not in record:
        raise BadSample("unsupported_video", f"{where}: videos are not decoded; name the frames of a clip")
    named = [*_named(record, "image", where), *_named(record, "audio", where)]
    dialect = dialect_of(record)
    talk = read_messages(record, dialect, where, _count(named, num_images))
    pairs, weights, notes = talk.pairs, talk.weights, talk.notes
    media = _together(named, talk.media, where)
    if num_images is not None:  # Names in the record are those that its pictures had elsewhere.
        media = [medium for medium in media if medium.kind != "image"]
    count = _count(media, num_images)
    if num_images is not None and count["audio"]:
        raise BadSample("bad_audio_field", f"{where}: sounds are read beside JSON and JSONL files only")
    if "frames" in record and count["image"]:
        pairs = mark_frames(pairs, count["image"])
    system = _system(record, where)
    if pairs and pairs[0][0] == "system":
        if system.strip() not in ("", pairs[0][1].strip()):
            rule = "it also has a system message, which is read"
            notes.append(Note("system_not_read", f"{where}: system of the record is not read: {rule}"))
        system, pairs, weights = pairs[0][1], pairs[1:], weights[1:]
    roles = [role for role, _ in pairs]
    if not pairs or roles != ["user", "assistant"] * (len(pairs) // 2):
        found = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "") or "none"
        rule = "expected messages of user and assistant by turns, a user first and an assistant last"
        raise BadSample("bad_conversation", f"{where}: {rule}; found {found}")
    _check_marks(record, system, [text for role, text in pairs if role == "user"], count, where)
    if count["audio"]:
        pairs, media = _in_order(pairs, media)
    boxes = boxes_of(record.get("boxes"), where)
    pictures = [medium for medium in media if medium.kind == "image"]
    frame, odd = _frame(record, [text for _, text in pairs], lambda: images(pictures, where), where)
    notes += odd
    language = record.get("lang")
    language = language if isinstance(language, str) else ""
    turns = [
        _turn(_turned(question, frame), _turned(answer, frame), language, boxes, frame, where)
        for (_, question), (_, answer) in zip(pairs[::2], pairs[1::2], strict=True)
    ]
    whole = 1.0
    if "weight" not in labels:
        whole, more = weight_of(record, ("weight",), where)
        notes += more
    weights = [whole * weight for weight in weights[1::2]]
    if not any(weights):
        raise BadSample(
            "no_weight", f"{where}: every answer has the weight 0, so that nothing is learnt from it"
        )
    turns = [turn if w == 1 else replace(turn, weight=w) for turn, w in zip(turns, weights, strict=True)]
    notes += unread(record, _READ | {*DIALECTS[dialect], *labels}, where)
    known = labels_of({**record, ANSWER: turns[0].answer}, labels, where) if labels else {}
    turns = [_captioned(turns, where)] if caption else turns
    return Conversation(identity, tuple(turns), tuple(media), system, known, tuple(notes))


def _system(record: Mapping[str, Any], where: str) -> str:
    """What the record says to begin with, beside its messages."""
    given = next((record[key] for key in _SYSTEM if record.get(key)), "")
    return checked_text(given, f"{where}: system")


def _together(named: list[Medium], inline: list[Medium], where: str) -> list[Medium]:
    """The files that a record and its messages name; both may name the same ones."""
    for kind in MARKS:
        beside, within = ([m for m in media if m.kind == kind] for media in (named, inline))
        if beside and within and beside != within:
            message = f"{where}: {kind}s are named beside the messages and in them, and are not the same"
            raise BadSample(f"bad_{kind}_field", f"{message}: name them in one place")
    return named + [medium for medium in inline if medium not in named]


def labels_of(record: Mapping[str, Any], names: Sequence[str], where: str) -> dict[str, Any]:
    """Some fields of a record, without those that are null.

    Raises:
      BadSample: the record has no such field.
    """
    missing = [name for name in names if name not in record]
    if missing:
        found = meant({k: v for k, v in record.items() if k not in names}, missing[:1])
        raise BadSample("missing_field", f"{where}: no field {missing[0]!r}; {found}")
    return {name: record[name] for name in names if record[name] is not None}


def _captioned(turns: Sequence[Turn], where: str) -> Turn:
    """The only turn without its question; its pictures stay."""
    if len(turns) != 1:
        raise BadSample("bad_conversation", f"{where}: {len(turns)} answers, a caption is the only one")
    marks = f"{IMAGE_PLACEHOLDER}\n" * turns[0].question.count(IMAGE_PLACEHOLDER)
    return replace(turns[0], question=marks, kind=TEXT)


def _named(record: dict[str, Any], kind: Kind, where: str) -> list[Medium]:
    """The files that a record itself names."""
    given = [record[key] for key in _NAMES[kind] if record.get(key)]
    lists = [names if isinstance(names, list) else [names] for names in given]
    lists = [[n.get("path") if isinstance(n, dict) else n for n in names] for names in lists]
    if not all(isinstance(name, str) for names in lists for name in names):
        rule = f"{kind} must be a path or a list of paths"
        raise BadSample(f"bad_{kind}_field", f"{where}: {rule}, not {str(given[0])[:40]!r}")
    if len(lists) == 2 and lists[0] != lists[1]:
        message = f"{where}: {kind} and {kind}s name other files: leave one of them out"
        raise BadSample(f"bad_{kind}_field", message)
    return [Medium(kind, str(name)) for name in (lists[0] if lists else [])]


def _count(media: Sequence[Medium], num_images: int | None) -> dict[str, int]:
    """How many there are of each kind; images that come with a record without names count as well."""
    count = {kind: sum(medium.kind == kind for medium in media) for kind in MARKS}
    if num_images is not None and not count["image"]:
        count["image"] = num_images
    return count


def _check_marks(
    record: Mapping[str, Any], system: str, questions: Sequence[str], count: dict[str, int], where: str
) -> None:
    for kind, mark in MARKS.items():
        if mark in system:
            rule = "write it into the question that the file belongs to"
            raise BadSample("placeholder_mismatch", f"{where}: {mark} in the system message: {rule}")
        marks = sum(text.count(mark) for text in questions)
        if marks == count[kind]:
            continue
        if marks < count[kind]:
            rule = f"write {mark} into a question once for each {kind}, where it belongs"
        elif not any(record.get(key) for key in _NAMES[kind]):
            found = meant(record, _NAMES[kind], ALIASES[kind])
            rule = f"no key {kind!r} or {kind + 's'!r} names them; {found}"
        else:
            rule = f"name a file for each {mark}, or write it less often"
        message = f"{where}: {marks} {mark} placeholders in the questions for {count[kind]} {kind}s: {rule}"
        raise BadSample("placeholder_mismatch", message)


def _in_order(
    pairs: Sequence[tuple[str, str]], media: Sequence[Medium]
) -> tuple[list[tuple[str, str]], list[Medium]]:
    """The messages with one kind of mark only, and the files in the order of the marks."""
    files = {mark: iter([m for m in media if m.kind == kind]) for kind, mark in MARKS.items()}
    marks = [mark for role, text in pairs if role == "user" for mark in ANY_MARK.findall(text)]
    said = [(role, ANY_MARK.sub(IMAGE_PLACEHOLDER, text) if role == "user" else text) for role, text in pairs]
    return said, [next(files[mark]) for mark in marks]


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


def boxes_of(given: Any, where: str) -> list[Box]:
    """The boxes of a record, ``[{"label", "bbox": [x0, y0, x1, y1]}]``; none where it is null.

    Raises:
      BadSample: it is no list of boxes.
    """
    found = given or []
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
