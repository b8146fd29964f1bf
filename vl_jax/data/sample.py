"""The records every data source yields: a ``Sample`` is images plus a conversation about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from PIL import Image as PilImage

IMAGE_PLACEHOLDER = "<image>"
DEFAULT_MAX_PIXELS = 64_000_000

T = TypeVar("T")

# An image is a function without arguments that gives an RGB picture; files open only when it is called.
Image = Callable[[], PilImage.Image]


@runtime_checkable
class SizedImage(Protocol):
    """An image that knows its size before a pixel of it is there."""

    def size(self) -> tuple[int, int]: ...


def image_size(image: Image) -> tuple[int, int]:
    """Width and height in pixels, without decoding or drawing the picture where that is possible.

    Raises:
      BadSample: the image cannot be used.
    """
    return image.size() if isinstance(image, SizedImage) else image().size


class BadSample(ValueError):
    """One record that cannot be used; ``reason`` is a short snake_case word that counters group by."""

    def __init__(self, reason: str, message: str):
        super().__init__(f"{message} [{reason}]")
        self.reason = reason


@dataclass(frozen=True)
class Box:
    """A labelled rectangle in pixels of the original image: ``corners`` is x0, y0, x1, y1."""

    label: str
    corners: tuple[float, float, float, float]


@dataclass(frozen=True)
class Turn:
    """One question and its answer; the question may hold ``<image>`` placeholders."""

    question: str
    answer: str
    kind: str = ""
    language: str = ""
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A conversation about zero or more images; as many placeholders as images, in the same order."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Image, ...] = ()
    system: str = ""

    def select(self, indices: list[int]) -> Sample:
        """The conversation made of some of the turns, in the given order, still opened by the images."""
        if indices == list(range(len(indices))):
            turns = self.turns[: len(indices)]
            num_images = sum(t.question.count(IMAGE_PLACEHOLDER) for t in turns)
            return dataclasses.replace(self, turns=turns, images=self.images[:num_images])
        questions = standalone_questions(self)
        bare = [t.question for t in self.turns]
        if self.images:
            bare[0] = questions[0][len(_lead(self.turns[0].question, len(self.turns))[0]) :]
        turns = [
            dataclasses.replace(self.turns[i], question=questions[i] if rank == 0 else bare[i])
            for rank, i in enumerate(indices)
        ]
        return dataclasses.replace(self, turns=tuple(turns))

    def without_images(self) -> Sample:
        """The same conversation with images and placeholders withheld."""
        turns = tuple(dataclasses.replace(t, question=_strip_placeholders(t.question)) for t in self.turns)
        return dataclasses.replace(self, turns=turns, images=())


def standalone_questions(sample: Sample) -> list[str]:
    """Each turn's question as it reads when asked alone, with the images in front of it.

    Raises:
      BadSample: an image first appears in a later turn, so the turns depend on one another.
    """
    first, *rest = [t.question for t in sample.turns]
    if any(IMAGE_PLACEHOLDER in q for q in rest):
        raise BadSample("image_in_later_turn", f"sample {sample.id}: a later turn brings its own image")
    lead, remainder = _lead(first, len(sample.turns))
    return [lead + remainder, *(lead + q for q in rest)]


@dataclass(frozen=True)
class FileImage:
    """An image file, checked by its header before any pixel is decoded."""

    path: Path
    where: str  # "sample ID (FILE, record N)", for messages
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __call__(self) -> PilImage.Image:
        """Decodes to RGB; transparent pixels become white.

        Raises:
          BadSample: the file is missing, its header promises too many pixels, or it cannot be decoded.
        """
        return self._open(to_rgb)

    def size(self) -> tuple[int, int]:
        """Width and height as the file's header has them.

        Raises:
          BadSample: the file is missing, its header cannot be read or promises too many pixels.
        """
        return self._open(lambda picture: picture.size)

    def _open(self, use: Callable[[PilImage.Image], T]) -> T:
        if not self.path.is_file():
            raise BadSample("missing_image", f"{self.where}: no image file {self.path}")
        try:
            with PilImage.open(self.path) as picture:  # reads the header only
                width, height = picture.size
                if width * height > self.max_pixels:
                    raise BadSample(
                        "image_too_large",
                        f"{self.where}: {self.path} is {width}x{height}, limit {self.max_pixels} pixels",
                    )
                return use(picture)
        except (PilImage.DecompressionBombError, PilImage.DecompressionBombWarning) as error:
            raise BadSample("image_too_large", f"{self.where}: {self.path}: {error}") from None
        except BadSample:
            raise
        except Exception as error:  # Decoders of hostile files raise almost anything.
            message = f"{self.where}: cannot decode {self.path}: {error or type(error).__name__}"
            raise BadSample("corrupt_image", message) from None


def to_rgb(picture: PilImage.Image) -> PilImage.Image:
    """An RGB copy; where the picture is transparent, white shows through."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = PilImage.new("RGBA", layer.size, (255, 255, 255, 255))
        return PilImage.alpha_composite(white, layer).convert("RGB")
    return picture.convert("RGB")


def _lead(question: str, num_turns: int) -> tuple[str, str]:
    """Splits the first question into its images (and what leads up to them) and the question itself."""
    head, placeholder, tail = question.rpartition(IMAGE_PLACEHOLDER)
    if not placeholder:
        return "", question
    if num_turns > 1 and not tail.strip() and head.replace(IMAGE_PLACEHOLDER, "").strip():
        # The images come after the question: other turns must not be asked behind that question.
        return f"{IMAGE_PLACEHOLDER}\n" * question.count(IMAGE_PLACEHOLDER), _strip_placeholders(question)
    space = tail[: len(tail) - len(tail.lstrip())]
    return head + placeholder + space, tail[len(space) :]


def _strip_placeholders(question: str) -> str:
    return question.replace(f"{IMAGE_PLACEHOLDER}\n", "").replace(IMAGE_PLACEHOLDER, "").strip()
