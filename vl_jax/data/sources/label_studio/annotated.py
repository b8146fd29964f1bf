"""Results of Label Studio that belong together: regions with all that was said of them, and answers.

    {"id": "r", "type": "rectangle", "value": {place}}            a region,
    {"id": "r", "type": "labels", "value": {place, "labels"}}     the label that a second control gave it,
    {"id": "r", "type": "textarea", "value": {"text": [...]}}     what is written there
    {"id": "r", "type": "choices", "value": {"choices": [...]}}   and an answer about it alone
    {"id": "c", "type": "choices", "value": {"choices": [...]}}   an answer about the whole picture

Results belong to the region of their id; where there is none, or several regions share it, to that of their
place. What belongs to no region, or cannot be read, becomes a note: nothing is left out without one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vl_jax.data.picture import PictureFrame
from vl_jax.data.sample import IMAGE_PLACEHOLDER, BadSample, Box, Note, Turn, in_one_line
from vl_jax.data.sources.coco import turns_about
from vl_jax.data.sources.label_studio.regions import DRAWN, DrawnRegion, read_region
from vl_jax.data.sources.messages import checked_text
from vl_jax.data.text import grounding

_PLACE = ("x", "y", "width", "height", "rotation", "radiusX", "radiusY", "points", "rle")
_CHOSEN = frozenset({"choices", "taxonomy", "number", "rating", "datetime"})
_ANSWERS = _CHOSEN | {"textarea"}
# What a place is where its result does not say so.
_SHAPES = {"points": "polygon", "rle": "brush", "radiusX": "ellipse", "width": "rectangle"}


@dataclass
class _Region:
    """A region, its labels, and the answers about it: (control, whether it is a text, words)."""

    drawn: DrawnRegion
    labels: list[str]
    answers: list[tuple[str, bool, str]] = field(default_factory=list)

    @property
    def box(self) -> Box:
        return Box(self.labels[0] if self.labels else "", self.drawn.corners)

    @property
    def place(self) -> str:
        """Where it is, as text has it."""
        drawn = self.drawn
        text = grounding.write_boxes([self.box], width=drawn.width, height=drawn.height)
        return text[text.index("<|det|>") :]


@dataclass
class Annotated:
    """What the results of one annotation say: turns about the picture, and notes of what is not in them."""

    turns: list[Turn] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


def annotated(
    results: Sequence[Any], question: str, where: str, frames: Sequence[PictureFrame] = ()
) -> Annotated:
    """Reads the results about one picture.

    Args:
      question: of the whole task; empty: answers are asked for by the names of their controls.
      frames: that of the picture, see ``read_region``.
    """
    reader = _Results(where, frames)
    reader.read(results)
    located = [region for region in reader.regions if region.labels or region.answers]
    for region in reader.regions:
        if not region.labels and not region.answers:
            corners = tuple(round(corner) for corner in region.drawn.corners)
            reader.note("no_label", f"{where}: the region at {corners} has no label, text or choice")
    turns = [*_about_labels(located, reader), *_about_regions(located), *_about_all(reader, question)]
    return Annotated(turns, reader.notes)


class _Results:
    """Goes through results and puts together what belongs together."""

    def __init__(self, where: str, frames: Sequence[PictureFrame]):
        self.where, self._frames = where, frames
        self.regions: list[_Region] = []
        self.answers: list[tuple[str, bool, str]] = []  # about the whole picture
        self.notes: list[Note] = []
        self._by_place: dict[Hashable, _Region] = {}  # by id and place
        self._by_id: dict[str, list[_Region]] = defaultdict(list)
        self._at: dict[Hashable, list[_Region]] = defaultdict(list)  # by place alone
        self._lost: set[str] = set()  # ids of regions that cannot be read

    def note(self, reason: str, message: str) -> None:
        """Notes what is left out."""
        self.notes.append(Note(reason, message))

    def read(self, results: Sequence[Any]) -> None:
        """Reads regions first: what belongs to them may come before them."""
        others = []
        for number, result in enumerate(results):
            where = f"{self.where}, result {number}"
            kind = result.get("type") if isinstance(result, dict) else None
            if not isinstance(result, dict) or not isinstance(result.get("value"), dict):
                self.note("result_not_read", f"{where}: a result of type {str(kind)[:40]!r} without a value")
            elif isinstance(kind, str) and kind in DRAWN:
                if not self._caught(where, result, self._draw):
                    self._lost |= {_identity(result)} - {""}
            else:
                others.append((where, result))
        for where, result in others:
            kind = result.get("type")
            if kind == "labels" or (isinstance(kind, str) and kind in _ANSWERS):
                self._caught(where, result, self._attach)
            else:
                message = f"{where}: results of type {str(kind)[:40]!r} are not read"
                self.note("result_not_read", message)

    def _caught(
        self, where: str, result: dict[str, Any], use: Callable[[str, dict[str, Any]], object]
    ) -> bool:
        """Uses a result; says whether that went well. If it breaks a rule that is noted."""
        try:
            use(where, result)
        except BadSample as error:
            self.note(error.reason, str(error).removesuffix(f" [{error.reason}]"))
            return False
        return True

    def _draw(self, where: str, result: dict[str, Any]) -> _Region:
        identity, place = _identity(result), _place(result["value"])
        found = self._by_place.get((identity, place))
        labels = read_labels(result, where)
        if found is None:
            found = self._by_place[identity, place] = _Region(read_region(result, where, self._frames), [])
            self.notes += found.drawn.notes
            self.regions.append(found)
            self._by_id[identity].append(found)
            self._at[place].append(found)
        found.labels += [label for label in labels if label not in found.labels]
        return found

    def _attach(self, where: str, result: dict[str, Any]) -> None:
        kind, value, identity = result["type"], result["value"], _identity(result)
        if identity in self._lost and (identity, _place(value)) not in self._by_place:
            raise BadSample("result_not_read", f"{where}: the {kind} of a region that cannot be read")
        labels = read_labels(result, where) if kind == "labels" else []
        name = in_one_line(str(result.get("from_name") or "")[:80]).replace("_", " ").strip()
        words = "" if kind == "labels" else _words(result, where)
        region = self._region_of(result, where)
        if region is None and _place(value) is not None:  # It tells its place itself.
            shape = next(shape for key, shape in _SHAPES.items() if key in value)
            region = self._draw(where, {**result, "type": shape})
        if kind == "labels" and region is None:
            raise BadSample("result_not_read", f"{where}: labels that belong to no region of the picture")
        if region is None:
            self.answers.append((name, kind == "textarea", words))
        elif kind == "labels":
            region.labels += [label for label in labels if label not in region.labels]
        else:
            region.answers.append((name, kind == "textarea", words))

    def _region_of(self, result: dict[str, Any], where: str) -> _Region | None:
        """The region that a result belongs to.

        Raises:
          BadSample: it may be one of several.
        """
        identity, place = _identity(result), _place(result["value"])
        if (found := self._by_place.get((identity, place))) is not None:
            return found
        several = self._by_id[identity] if identity and identity in self._by_id else []
        if not identity and place is not None:
            several = self._at.get(place, [])
        if len(several) > 1:
            rule = "which of them it belongs to cannot be told"
            shared = f"the id {identity[:40]!r}" if identity else "a place"
            message = f"{where}: {len(several)} regions share {shared}: {rule}"
            raise BadSample("result_not_read", message)
        return several[0] if several else None


def read_labels(result: dict[str, Any], where: str) -> list[str]:
    """The labels that a result itself has.

    Raises:
      BadSample: one is no text, or holds a special mark.
    """
    value, kind = result["value"], result["type"]
    names = (kind, "labels") if kind.endswith("labels") else (f"{kind}labels", "labels")
    found = next((value[name] for name in names if value.get(name)), [])
    labels = [checked_text(label, where) for label in (found if isinstance(found, list) else [found])]
    if any(mark in label for label in labels for mark in grounding.SPECIAL):
        raise BadSample("bad_box", f"{where}: a label holds a special mark")
    return [label for label in labels if label.strip()]


def _identity(result: dict[str, Any]) -> str:
    """The id of a result; empty if it has none."""
    found = result.get("id")
    return "" if found is None else str(found)


def _place(value: dict[str, Any]) -> Hashable | None:
    """What two results of the same place have in common; None of a result without one."""
    if not any(key in value for key in _SHAPES) or ("width" in value and "x" not in value):
        return None
    return tuple(_plain(value.get(key) or 0) for key in _PLACE)


def _plain(value: Any) -> Hashable:
    """Numbers that are equal in one form, whatever they are written as."""
    if isinstance(value, list):
        return tuple(map(_plain, value))
    return float(value) if type(value) in (int, float) and abs(value) < 1e6 else repr(value)


def _words(result: dict[str, Any], where: str) -> str:
    """The text of a transcript, or what was chosen."""
    value, kind = result["value"], result["type"]
    found = value.get(kind, value.get("text"))
    found = found if isinstance(found, list) else [found]
    if kind == "taxonomy":  # each a path from the root
        found = [" / ".join(map(str, path)) if isinstance(path, list) else path for path in found]
    if kind in ("number", "rating"):
        found = [str(item) if type(item) in (int, float) else item for item in found]
    text = ("\n" if kind == "textarea" else ", ").join(checked_text(item, where) for item in found)
    if not text.strip():
        raise BadSample("bad_conversation", f"{where}: an empty text or choice")
    if IMAGE_PLACEHOLDER in text:
        raise BadSample("placeholder_mismatch", f"{where}: {IMAGE_PLACEHOLDER} in a text")
    return text


def _about_labels(located: Sequence[_Region], reader: _Results) -> list[Turn]:
    """What is on the picture, and where."""
    labelled = [region for region in located if region.labels]
    if not labelled:
        return []
    size = (labelled[0].drawn.width, labelled[0].drawn.height)
    fitting = [r for r in labelled if (r.drawn.width, r.drawn.height) == size]
    if len(fitting) < len(labelled):
        rule = f"in a picture of another size than the first of {size[0]}x{size[1]}"
        for region in labelled:
            if region not in fitting:
                reader.note("bad_box", f"{reader.where}: the region {region.labels[0][:40]!r} is {rule}")
    boxes = [Box(label, region.drawn.corners) for region in fitting for label in region.labels]
    return turns_about(boxes, *size)


def _about_regions(located: Sequence[_Region]) -> Iterator[Turn]:
    """What is written in each region, all of it first, and what else was said of it."""
    controls = {name for region in located for name, is_text, _ in region.answers if is_text}
    written = ["\n".join(words for _, is_text, words in r.answers if is_text) for r in located]
    if len(controls) == 1 and sum(map(bool, written)) > 1:
        whole = "\n".join(filter(None, written))
        yield Turn("What is written in the picture?", whole, "ocr")
    for region, text in zip(located, written, strict=True):
        box = Box(region.labels[0] if region.labels else "text", region.drawn.corners)
        if text and len(controls) == 1:
            yield Turn(f"What is written at {region.place}?", text, "ocr", "", (box,))
        said: dict[str, list[str]] = defaultdict(list)
        for name, is_text, words in region.answers:
            if not is_text or len(controls) > 1:
                said[name].append(words)
        for name, words in said.items():
            question = f"What is the {name or 'answer'} at {region.place}?"
            yield Turn(question, "\n".join(words), "open", "", (box,))


def _about_all(reader: _Results, question: str) -> Iterator[Turn]:
    """Choices and texts about the whole picture; of several controls, that called answer has the question."""
    said: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for name, is_text, words in reader.answers:
        said[name, is_text].append(words)
    several = len(said) > 1
    asked = {name for name, _ in said if name.lower() in ("answer", "answers")} if several else set()
    if question and several and not asked:
        names = ", ".join(repr(name) for name, _ in said)
        rule = "call the one that answers it 'answer'"
        reader.note("question_not_read", f"{reader.where}: which of {names} answers the question? {rule}")
    for (name, is_text), words in said.items():
        own = question if not several or name in asked else ""
        own = own or f"What is the {name or 'answer'}?"
        yield Turn(own, ("\n" if is_text else ", ").join(words), "open")
