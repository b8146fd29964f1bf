"""A question of a kit: a conversation of texts and pictures, and how its answer is chosen.

Pictures that open a message are followed by a line end, as in training; others stand where they stand.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image as PilImage

from vl_jax.data.levels import LevelsError
from vl_jax.data.picture import Orientation, to_rgb
from vl_jax.data.sample import IMAGE_PLACEHOLDER, FileImage, Image, Sample, Turn

_log = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant")
Part = str | PilImage.Image | Path  # a text, an open picture, or the file of one


@dataclass(frozen=True)
class Said:
    """One message: its text, with a mark for each of its pictures."""

    role: str
    text: str
    pictures: tuple[PilImage.Image | Path, ...] = ()


@dataclass(frozen=True)
class KitQuestion:
    """A conversation that ends with what the user asks.

    Attributes:
      name: what messages call it, such as the task and the number of the document.
      said: perhaps a system text, then user and assistant in turn.
    """

    name: str
    said: tuple[Said, ...]

    @property
    def pictures(self) -> tuple[PilImage.Image | Path, ...]:
        """Those of all messages, in order."""
        return tuple(picture for said in self.said for picture in said.pictures)

    def sample(self, orientation: Orientation, *, answer: str = "") -> Sample:
        """It as a sample of a run's data, with a text in the place of the answer."""
        system = self.said[0].text if self.said[0].role == "system" else ""
        spoken = [said.text for said in self.said if said.role != "system"]
        turns = zip(spoken[::2], [*spoken[1::2], answer], strict=True)
        images = tuple(self._image(picture, orientation) for picture in self.pictures)
        return Sample(self.name, tuple(Turn(q, a) for q, a in turns), images, system)

    def _image(self, picture: PilImage.Image | Path, orientation: Orientation) -> Image:
        if isinstance(picture, Path):
            return FileImage(picture, self.name, orientation=orientation)
        try:
            decoded = to_rgb(picture)  # an open picture stays the way up it is
        except LevelsError as error:
            raise ValueError(f"{self.name}: a picture: {error}") from None
        return lambda: decoded


def question(name: str, messages: Iterable[tuple[str, Sequence[Part]]]) -> KitQuestion:
    """A question from messages, each a role and its texts and pictures in order.

    Messages of one role that follow one another become one, with a line end between them. A text cannot
    hold a picture's mark, which is left out of it.

    Raises:
      ValueError: a role is unknown or out of turn, a picture stands elsewhere than in a user's message, or
        there is nothing to answer.
    """
    merged: list[tuple[str, list[Part]]] = []
    for role, parts in messages:
        if role not in ROLES:
            raise ValueError(f"{name}: role {role!r}: expected one of {', '.join(ROLES)}")
        if merged and merged[-1][0] == role:
            merged[-1][1].extend(["\n", *parts])
        else:
            merged.append((role, list(parts)))
    said = tuple(_said(name, role, parts) for role, parts in merged)
    spoken = [one.role for one in said[bool(said and said[0].role == "system") :]]
    if "system" in spoken or spoken[::2] != ["user"] * len(spoken[::2]):
        raise ValueError(f"{name}: {', '.join(spoken)}: expected user and assistant in turn, the user first")
    if len(spoken) % 2 == 0:
        raise ValueError(f"{name}: ends with {spoken[-1] if spoken else 'no'} message; the user asks last")
    return KitQuestion(name, said)


def asked(name: str, text: str, pictures: Sequence[PilImage.Image | Path]) -> KitQuestion:
    """A question that is one text, in which ``<image>`` may mark the place of each picture.

    Where there are not as many marks as pictures, the pictures come first, and the marks are left out.
    """
    if text.count(IMAGE_PLACEHOLDER) != len(pictures):
        return question(name, [("user", [*pictures, text])])
    return KitQuestion(name, (Said("user", text, tuple(pictures)),))


def picture(name: str, value: Any) -> PilImage.Image | Path:
    """A picture as a kit hands it over: open, or the path of its file.

    Raises:
      ValueError: it is something else.
    """
    if isinstance(value, PilImage.Image):
        return value
    if isinstance(value, str | PathLike) and Path(value).is_file():
        return Path(value)
    kind = f"{str(value)[:80]!r}, no such file" if isinstance(value, str | PathLike) else type(value).__name__
    raise ValueError(f"{name}: a picture is {kind}; expected an open picture or the path of a file")


def parts(name: str, content: Any, *, text: str, image: str) -> list[Part]:
    """The texts and pictures of a message as a kit has them: a text, or a list of objects with a ``type``.

    Args:
      text, image: under which name an object of that type holds it.

    Raises:
      ValueError: a part is of another type, or a picture is none.
    """
    if isinstance(content, str):
        return [content]
    found: list[Part] = []
    for part in content:
        if part["type"] not in ("text", "image"):
            raise ValueError(
                f"{name}: has a part of type {part['type']}; vl_jax models are shown pictures and text"
            )
        is_text = part["type"] == "text"
        found.append(str(part[text]) if is_text else picture(name, part[image]))
    return found


def _said(name: str, role: str, parts: Sequence[Part]) -> Said:
    text, pictures = "", []
    for part in parts:
        if isinstance(part, str):
            if IMAGE_PLACEHOLDER in part:
                _log.warning("%s: %s in a text is left out", name, IMAGE_PLACEHOLDER)
            text += part.replace(IMAGE_PLACEHOLDER, "")
            continue
        opens = not text.replace(IMAGE_PLACEHOLDER, "").strip()
        text += f"{IMAGE_PLACEHOLDER}\n" if opens else IMAGE_PLACEHOLDER
        pictures.append(part)
    if pictures and role != "user":
        raise ValueError(f"{name}: a picture in a message of role {role}; they may stand in the user's only")
    return Said(role, text, tuple(pictures))


# Options of a kit that say how an answer is chosen, by ours.
_OPTIONS = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "num_beams",
    "length_penalty",
    "repetition_penalty",
)
_OTHERS = ("until", "do_sample")


@dataclass(frozen=True)
class Choice:
    """How an answer is chosen.

    Attributes:
      options: of ``GenerationConfig``, as pairs.
      until: texts that end an answer, and are no part of it.
    """

    options: tuple[tuple[str, Any], ...]
    until: tuple[str, ...] = ()


def choice(given: Mapping[str, Any], *, max_new_tokens: int) -> tuple[Choice, tuple[str, ...]]:
    """How an answer is chosen, from a kit's options; and the names of those that are not known.

    ``do_sample`` of False and a temperature of 0 (or none at all) both mean the likeliest token each time.

    Args:
      max_new_tokens: where none is given.

    Raises:
      ValueError: a value is of the wrong kind.
    """
    found: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    found |= {name: given[name] for name in _OPTIONS if given.get(name) is not None}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name}={value!r}: expected a number")
    if given.get("do_sample") and "temperature" not in found:
        found["temperature"] = 1.0
    if given.get("do_sample") is False or not found.get("temperature"):
        found = {k: v for k, v in found.items() if k not in ("temperature", "top_k", "top_p")}
    if not found.get("top_k", 1):
        del found["top_k"]  # 0 is how other programs say all
    if found.get("top_p") == 0:
        del found["top_p"]
    until = given.get("until")
    ends = (until,) if isinstance(until, str) else tuple(until or ())
    if not all(isinstance(end, str) for end in ends):
        raise ValueError(f"until={until!r}: expected a text, or a list of texts")
    unknown = tuple(name for name in given if name not in (*_OPTIONS, *_OTHERS))
    return Choice(tuple(sorted(found.items())), tuple(end for end in ends if end)), unknown
