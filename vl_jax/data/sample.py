"""The records every data source yields: a ``Sample`` is images plus a conversation about them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import os
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from PIL import Image as PilImage

from vl_jax.data.levels import LevelsError
from vl_jax.data.picture import Orientation, PictureFrame, decode, decode_reduced, read_frame
from vl_jax.runtime.storage import buckets

IMAGE_PLACEHOLDER = "<image>"
DEFAULT_MAX_PIXELS = 64_000_000
# How names begin that are no paths.
REMOTE = ("http", "https", "data", "file", "s3", "gs", "hdfs", "ftp")
TEXT = "text"  # the kind of a turn without a question: its answer is read as it is, no mark before it

T = TypeVar("T")

# An image is a function without arguments that gives an RGB picture; files open only when it is called.
Image = Callable[[], PilImage.Image]
# Another input is a function that gives an array, such as the samples of a sound.
Media = Callable[[], np.ndarray]


@runtime_checkable
class SizedImage(Protocol):
    """An image that knows its size before a pixel of it is there."""

    def size(self) -> tuple[int, int]: ...


@runtime_checkable
class ReducibleImage(SizedImage, Protocol):
    """An image that may be decoded at a part of its size."""

    def __call__(self) -> PilImage.Image: ...

    def at_least(self, width: int, height: int, /) -> PilImage.Image: ...


def image_size(image: Image) -> tuple[int, int]:
    """Width and height in pixels, without decoding or drawing the picture where that is possible.

    Raises:
      BadSample: the image cannot be used.
    """
    return image.size() if isinstance(image, SizedImage) else image().size


def image_key(image: Image) -> Hashable:
    """What the pixels of an image follow from while its file stays as it is; None where nothing says so.

    An image says so by a property ``key``.
    """
    return getattr(image, "key", None)


def pixels_digest(picture: PilImage.Image) -> bytes:
    """32 bytes that two RGB pictures have in common only if they look the same."""
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()


class BadSample(ValueError):
    """One record that cannot be used; ``reason`` is a short snake_case word that counters group by."""

    def __init__(self, reason: str, message: str):
        message = in_one_line(message)
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
        super().__init__(reason, message)  # as they were given: so it may go from one process to another
        self.reason, self._message = reason, message

    def __str__(self) -> str:
        return f"{self._message} [{self.reason}]"


@dataclass(frozen=True)
class Note:
    """What of a record is left out or odd while it is used; counters group by ``reason``."""

    reason: str
    message: str

    def __str__(self) -> str:
        return f"{in_one_line(self.message)} [{self.reason}]"


@dataclass(frozen=True)
class Strays:
    """Parts of a source's file that belong to none of its records, hence to no ``Sample.notes``."""

    reason: str  # as that of a ``Note``
    count: int
    examples: tuple[str, ...]  # the first few


_LONGEST = 2000  # characters of a message
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]+")


def in_one_line(text: str) -> str:
    """A text that can be printed in a line: what breaks lines, and half a surrogate pair, becomes a mark."""
    return _UNPRINTABLE.sub("\ufffd", text)


def each(function: Callable[..., T], *columns: Sequence[Any]) -> list[T | BadSample]:
    """What a function gives for every row of the columns; a bad sample in a row, or raised, is the result.

    Loaders go stage by stage, not sample by sample: what a stage has brought into the processor's caches
    serves the whole chunk, which makes it a quarter quicker.
    """
    results: list[T | BadSample] = []
    for row in zip(*columns, strict=True):
        bad = [value for value in row if isinstance(value, BadSample)]
        try:
            results.append(bad[0] if bad else function(*row))
        except BadSample as error:
            results.append(error)
    return results


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
    weight: float = 1.0  # of the answer in the loss; 0: it is read, and nothing is learnt from it


@dataclass(frozen=True)
class Sample:
    """A conversation about zero or more images; as many placeholders as images, in the same order."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Image, ...] = ()
    system: str = ""
    labels: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # as the source has them, by name
    media: Mapping[str, Media] = dataclasses.field(default_factory=dict)  # inputs of other kinds, by name
    notes: tuple[Note, ...] = ()  # what of the record is not in it
    negatives: tuple[str, ...] = ()  # texts that are wrong of its images, in place of its own

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
        asked = [questions[i] if rank == 0 else bare[i] for rank, i in enumerate(indices)]
        turns = tuple(
            t if q is t.question else dataclasses.replace(t, question=q)
            for q, t in zip(asked, (self.turns[i] for i in indices), strict=True)
        )
        return dataclasses.replace(self, turns=turns)

    def without_images(self) -> Sample:
        """The same conversation with images and placeholders withheld."""
        turns = tuple(dataclasses.replace(t, question=_strip_placeholders(t.question)) for t in self.turns)
        return dataclasses.replace(self, turns=turns, images=())


@runtime_checkable
class Source(Protocol):
    """Random access to samples; reading a bad record raises ``BadSample``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


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


def opening(sample: Sample) -> str:
    """The images, and what leads up to them: what the standalone questions of all its turns begin with.

    Raises:
      BadSample: there is no such text, for a question comes before its image, or an image in a later turn.
    """
    lead, question = _lead(sample.turns[0].question, 2)
    if lead + question != standalone_questions(sample)[0]:
        raise BadSample("image_after_question", f"sample {sample.id}: asks before it shows the image")
    return lead


class _PictureFile:
    """What images share that are files, or lie in one: they are opened when they are called."""

    max_pixels: int
    orientation: Orientation

    def __call__(self) -> PilImage.Image:
        """Decodes to RGB, see ``picture.decode``; transparent pixels become white.

        Raises:
          BadSample: the file is missing, its header promises too many pixels, or it cannot be decoded.
        """
        return self._open(lambda picture: decode(picture, self.orientation))

    def frame(self) -> PictureFrame:
        """How its pixels lie, and how they are read; from the file's header.

        Raises:
          BadSample: the file is missing, its header cannot be read or promises too many pixels.
        """
        return self._open(lambda picture: read_frame(picture, self.orientation))

    def size(self) -> tuple[int, int]:
        """Width and height of the picture as it is read; raises as ``frame``."""
        return self.frame().size

    def at_least(self, width: int, height: int) -> PilImage.Image:
        """Decodes to RGB, no smaller than that where the file is not, but quicker where the format can."""
        return self._open(lambda picture: decode_reduced(picture, self.orientation, width, height))

    def opened(self, use: Callable[[PilImage.Image], T]) -> T:
        """What a function makes of the opened file, of which the header is read; raises as a call."""
        return self._open(use)

    def _open(self, use: Callable[[PilImage.Image], T]) -> T:
        raise NotImplementedError


@dataclass(frozen=True)
class FileImage(_PictureFile):
    """An image file, checked by its header before any pixel is decoded."""

    path: Path
    where: str  # "sample ID (FILE, record N)", for messages
    max_pixels: int = DEFAULT_MAX_PIXELS
    orientation: Orientation = "shown"
    rule: str = ""  # by which its name was read, for messages

    @property
    def key(self) -> tuple[str, int, Orientation]:
        """See ``image_key``."""
        return str(self.path), self.max_pixels, self.orientation

    def encoded(self) -> bytes:
        """The file as it is."""
        return self.path.read_bytes()

    def _open(self, use: Callable[[PilImage.Image], T]) -> T:
        if not os.path.isfile(self.path):
            rule = f" ({self.rule})" if self.rule else ""
            raise BadSample("missing_image", f"{self.where}: no image file {self.path}{rule}")
        return _open(self.path, str(self.path), self.where, self.max_pixels, use)


@dataclass(frozen=True)
class EncodedImage(_PictureFile):
    """An image file inside another file, read when it is asked for; otherwise like ``FileImage``."""

    encoded: Callable[[], bytes]
    label: str  # what messages call it
    where: str
    max_pixels: int = DEFAULT_MAX_PIXELS
    orientation: Orientation = "shown"

    def _open(self, use: Callable[[PilImage.Image], T]) -> T:
        return _open(io.BytesIO(self.encoded()), self.label, self.where, self.max_pixels, use)


def image_in(
    folder: Path, name: str, where: str, max_pixels: int, orientation: Orientation = "shown"
) -> FileImage:
    """The image file of that name; raises as ``path_in``."""
    rule = "names are relative to the folder of the record file, or to root of the source"
    return FileImage(path_in(folder, name, where, kind="image"), where, max_pixels, orientation, rule)


def path_in(folder: Path, name: str, where: str, *, kind: str) -> Path:
    """The path of that name, provided it lies inside the (resolved) folder once links are followed.

    Args:
      kind: what it is the path of, for messages and reasons.

    Raises:
      BadSample: it does not, or this is no name of a file.
    """
    if name.partition(":")[0].lower() in REMOTE:
        message = f"{where}: {name[:80]!r} is an address, and nothing is fetched: save the {kind} as a file"
        raise BadSample(f"bad_{kind}_field", f"{message}, and name its path inside {folder}")
    try:
        if b"\0" in os.fsencode(name):
            raise ValueError("embedded null byte")
        head, tail = os.path.split(os.path.join(folder, name))
        path = os.path.join(_real_folder(head), tail)
        if tail in ("", "..") or os.path.islink(path):
            path = os.path.realpath(path)
    except (OSError, ValueError) as error:
        raise BadSample(f"missing_{kind}", f"{where}: bad path {name[:80]!r}: {error}") from None
    inside = os.path.join(folder, "")
    if os.path.isabs(name) and path.startswith(inside):
        message = f"{where}: {name!r} is absolute; paths are relative: write {path.removeprefix(inside)!r}"
        raise BadSample("outside_root", message)
    if os.path.isabs(name) or not path.startswith(inside):
        rule = "name it relative to that folder, or set root of the source to a folder that has it"
        how = " by a link" if os.path.islink(os.path.join(folder, name)) else ""
        raise BadSample("outside_root", f"{where}: {name!r} leaves the {kind} folder {folder}{how}: {rule}")
    buckets.bring_one(Path(path))
    return Path(path)


@functools.lru_cache(maxsize=1024)
def _real_folder(folder: str) -> str:
    """The folder once links are followed; every image in it asks."""
    return os.path.realpath(folder)


def _open(
    file: Path | io.BytesIO, label: str, where: str, max_pixels: int, use: Callable[[PilImage.Image], T]
) -> T:
    try:
        with PilImage.open(file) as picture:  # reads the header only
            width, height = picture.size
            if width * height > max_pixels:
                message = f"{where}: {label} is {width}x{height}, limit {max_pixels} pixels"
                raise BadSample("image_too_large", message)
            return use(picture)
    except (PilImage.DecompressionBombError, PilImage.DecompressionBombWarning) as error:
        raise BadSample("image_too_large", f"{where}: {label}: {error}") from None
    except BadSample:
        raise
    except LevelsError as error:
        raise BadSample("unknown_levels", f"{where}: {label}: {error}") from None
    except PilImage.UnidentifiedImageError as error:
        message = f"{where}: cannot decode {label}: {error}; if other programs show it, save it as PNG"
        raise BadSample("corrupt_image", message) from None
    except Exception as error:  # Decoders of hostile files raise almost anything.
        message = f"{where}: cannot decode {label}: {error or type(error).__name__}"
        raise BadSample("corrupt_image", message) from None


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
