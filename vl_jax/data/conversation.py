"""Records to conversations, whatever file they come from; the dialect shows in the record's own keys.

    {"conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", "value": "A cat."}]}
    {"messages": [{"role": "user", "content": "<image>\\nWhat is it?"}, {"role": "assistant", ...}]}
    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ...}]}, ...]}
    {"question": "What is it?", "answer": "A cat."}         every image stands before the question
    {"text": "Once upon a time ..."}                        read as it is; with images it is their caption

Beside these may stand ``id``, ``image`` or ``images`` (paths) or ``frames`` (see ``clips``), ``lang``, and
``boxes``, which ``<box:0>`` in an answer refers to: ``[{"label": "cat", "bbox": [x0, y0, x1, y1]}]`` in
pixels of ``width`` x ``height``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vl_jax.data.clips import mark_frames
from vl_jax.data.grounding import to_grid
from vl_jax.data.sample import IMAGE_PLACEHOLDER, TEXT, BadSample, Box, Turn

_YES_NO = frozenset({"yes", "no", "是", "否", "不是", "是的"})
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_BOX_MARK = re.compile(r"<box:(\d{1,6})>")
_DIALECTS = ("conversations", "messages", "question", "text")


@dataclass(frozen=True)
class Conversation:
    """What a record says; ``images`` are the names it gives, in the order of their placeholders."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    system: str = ""


def parse(record: Any, where: str, *, default_id: str, num_images: int | None = None) -> Conversation:
    """Reads a record.

    Args:
      where: "file, record N", for messages.
      default_id: of a record without one.
      num_images: how many images come with the record where it does not name them.

    Raises:
      BadSample: the record breaks a rule; one line that says where, and which.
    """
    if not isinstance(record, dict):
        raise BadSample("not_an_object", f"sample ? ({where}): expected an object")
    identity = str(record.get("id", default_id))
    where = f"sample {identity[:80]} ({where})"
    names = _image_names(record, where)
    pairs, inline = _messages(record, where, len(names) if num_images is None else num_images)
    names += inline
    count = len(names) if num_images is None or names else num_images
    if "frames" in record and count:
        pairs = mark_frames(pairs, count)
    system = ""
    if pairs and pairs[0][0] == "system":
        system, pairs = pairs[0][1], pairs[1:]
    if not pairs or [role for role, _ in pairs] != ["user", "assistant"] * (len(pairs) // 2):
        raise BadSample("bad_conversation", f"{where}: expected messages of user and assistant by turns")
    if IMAGE_PLACEHOLDER in system:
        raise BadSample("placeholder_mismatch", f"{where}: {IMAGE_PLACEHOLDER} in the system message")
    placeholders = sum(text.count(IMAGE_PLACEHOLDER) for role, text in pairs if role == "user")
    if placeholders != count:
        message = f"{where}: {placeholders} {IMAGE_PLACEHOLDER} placeholders for {count} images"
        raise BadSample("placeholder_mismatch", message)
    boxes = _boxes(record, where)
    language = record.get("lang")
    language = language if isinstance(language, str) else ""
    turns = [
        _turn(question, answer, language, boxes, record, where)
        for (_, question), (_, answer) in zip(pairs[::2], pairs[1::2], strict=True)
    ]
    return Conversation(identity, tuple(turns), tuple(names), system)


def _image_names(record: dict[str, Any], where: str) -> list[str]:
    names = record.get("image") or record.get("images") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise BadSample("bad_image_field", f"{where}: image must be a path or a list of paths")
    return list(names)


def _messages(record: dict[str, Any], where: str, num_images: int) -> tuple[list[tuple[str, str]], list[str]]:
    """(role, text) of every message, and the images that messages name themselves."""
    dialect = next((key for key in _DIALECTS if record.get(key) is not None), None)
    if dialect == "text":
        text = checked_text(record["text"], where)
        return [("user", f"{IMAGE_PLACEHOLDER}\n" * num_images), ("assistant", text)], []
    if dialect == "question":
        question = checked_text(record["question"], where)
        if IMAGE_PLACEHOLDER not in question:
            question = f"{IMAGE_PLACEHOLDER}\n" * num_images + question
        return [("user", question), ("assistant", checked_text(record.get("answer"), where))], []
    messages = record[dialect] if dialect else None
    if not isinstance(messages, list) or not messages:
        message = f"{where}: {dialect or _DIALECTS[0]} must be a non-empty list"
        raise BadSample("bad_conversation", message)
    who, what = ("from", "value") if dialect == "conversations" else ("role", "content")
    images: list[str] = []
    pairs = []
    for message in messages:
        role = message.get(who) if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in _ROLES:
            rule = f"a message needs {who}: {', '.join(_ROLES)}"
            raise BadSample("bad_conversation", f"{where}: {rule}; found {str(role)[:40]!r}")
        pairs.append((_ROLES[role], _content(message.get(what), where, images)))
    return pairs, images


def _content(content: Any, where: str, images: list[str]) -> str:
    """The text of a message, given as one or in parts; images that parts name are added to the list."""
    if not isinstance(content, list):
        return checked_text(content, where)
    pieces = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            pieces.append(checked_text(part.get("text"), where))
            continue
        if kind not in ("image", "image_url"):
            raise BadSample("bad_conversation", f"{where}: a part of type {str(kind)[:40]!r}")
        pieces.append(f"{IMAGE_PLACEHOLDER}\n")
        name = part.get(kind)
        name = name.get("url") if isinstance(name, dict) else name
        if name is not None and (not isinstance(name, str) or name.partition(":")[0] in REMOTE):
            raise BadSample("bad_image_field", f"{where}: an image must be a path, not {str(name)[:40]!r}")
        images += [] if name is None else [name]
    return "".join(pieces)


# How names begin that are no paths.
REMOTE = ("http", "https", "data", "file", "s3", "gs")


def checked_text(value: Any, where: str) -> str:
    """The value if it is a text that can be written down.

    Raises:
      BadSample: it is not.
    """
    if not isinstance(value, str):
        message = f"{where}: expected a text, found {type(value).__name__}"
        raise BadSample("bad_conversation", message)
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError:
        raise BadSample("bad_conversation", f"{where}: half a surrogate pair in the text") from None
    return value


def _turn(
    question: str, answer: str, language: str, boxes: list[Box], record: dict[str, Any], where: str
) -> Turn:
    """A turn; ``<box:i>`` in the answer becomes the box on the grid of 0..999."""
    kind = "yes/no" if answer.strip().rstrip(".。!！").lower() in _YES_NO else "open"
    kind = kind if question.strip() else TEXT
    numbers = [int(n) for n in _BOX_MARK.findall(answer)] if "<box:" in answer else []
    if not numbers:
        return Turn(question, answer, kind=kind, language=language)
    size = (record.get("width"), record.get("height"))
    if not all(isinstance(n, int) and 0 < n < 10**6 for n in size) or max(numbers) >= len(boxes):
        message = (
            f"{where}: <box:{max(numbers)}> of {len(boxes)} boxes, in a picture of {size[0]!r} x {size[1]!r}"
        )
        raise BadSample("bad_box", message)
    width, height = int(size[0] or 0), int(size[1] or 0)

    def written(match: re.Match[str]) -> str:
        corners = to_grid(boxes[int(match[1])].corners, width, height)
        return f"<|det|>[[{', '.join(map(str, corners))}]]<|/det|>"

    named = tuple(boxes[n] for n in numbers)
    for box in named:
        x0, y0, x1, y1 = box.corners
        if not (x0 <= width and y0 <= height and x1 >= 0 and y1 >= 0):
            raise BadSample(
                "bad_box", f"{where}: a box at {box.corners} is outside its {width}x{height} picture"
            )
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
