"""Data sets of TensorFlow Datasets by name, prepared in the ArrayRecord format; TensorFlow is not needed.

tfds build --file_format=array_record coco_captions
TfdsConfig("coco", "coco_captions", answer="captions/text", prompt="Describe the picture.")
TfdsConfig("voc", "voc/2012", answer="objects/label", boxes="objects/bbox", prompt="Locate every {}.")
TfdsConfig("refs", "ref_coco", answer="objects/refexp/raw", boxes="objects/bbox", prompt="Locate {}.")

An object of ``ref_coco`` has several expressions, a list within a list: to prepare those, but not to read
them, TFDS needs TensorFlow.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vl_jax.data.images.frames import declared_frame
from vl_jax.data.picture import Orientation
from vl_jax.data.sample import (
    DEFAULT_MAX_PIXELS,
    IMAGE_PLACEHOLDER,
    BadSample,
    Box,
    EncodedImage,
    Sample,
    Turn,
)
from vl_jax.data.sources.conversation import parse
from vl_jax.data.text.grounding import SPECIAL, write_boxes
from vl_jax.runtime.storage import buckets


@dataclass(frozen=True)
class TfdsConfig:
    """A prepared data set, and the features that a conversation is made of; ``a/b`` is b within a."""

    name: str
    dataset: str  # such as "vqa_v2" or "coco_captions/2014:1.1.0"
    split: str = "train"
    root: str = ""  # folder of prepared data sets relative to the data root; empty: the data root
    image: str = "image"  # empty: the data set has no images
    question: str = ""  # empty: ``prompt`` is the question
    answer: str = "answer"  # of a list, each different one is a turn of its own, the most frequent first
    prompt: str = ""
    boxes: str = ""  # each has an answer, a phrase or a list of them; ``prompt``, with {}, asks where it is
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self):
        for field in ("name", "dataset", "split", "answer"):
            if not getattr(self, field):
                raise ValueError(f"{field}='' of source {self.name!r}: must not be empty")
        if self.boxes and (self.prompt.count("{}") != 1 or not self.image or self.question):
            raise ValueError(
                f"boxes={self.boxes!r} of source {self.name!r}: needs an image, no question, and a prompt "
                "with one {} for the phrase, such as 'Locate {}.'"
            )
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels={self.max_pixels} of source {self.name!r}: must be at least 1")

    def open(self, root: str, *, orientation: Orientation = "shown") -> TfdsSource:
        """The source; files are relative to ``root``."""
        return TfdsSource(self, root=root, orientation=orientation)


class TfdsSource:
    """Random access to a prepared data set; nothing is downloaded.

    Raises (on opening):
      ValueError: it is not there, not prepared as ArrayRecord, or lacks a feature that the config names.
    """

    def __init__(self, config: TfdsConfig, *, root: str = ".", orientation: Orientation = "shown"):
        import tensorflow_datasets as tfds

        self._config = config
        self._orientation: Orientation = orientation
        folder = (
            buckets.here(f"{root}/{config.root}") if buckets.is_bucket(root) else Path(root) / config.root
        )
        self._where = f"{folder}, {config.dataset}, {config.split}"
        decoders = {config.image: tfds.decode.SkipDecoding()} if config.image else None
        try:
            found: Any = tfds.data_source(
                config.dataset, split=config.split, data_dir=folder, download=False, decoders=decoders
            )
        except Exception as error:  # The library raises almost anything.
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ValueError(f"source {config.name!r}: {self._where}: {reason}") from None
        self._records = found
        names = {f for f in (config.image, config.question, config.answer, config.boxes) if f}
        known = dict(_features(found.dataset_info.features))
        missing = sorted(names.difference(known))
        if missing:
            there = f"no feature {missing[0]!r}; there are {', '.join(known)}"
            raise ValueError(f"source {config.name!r}: {self._where}: {there}")
        # Of a feature that is one of some classes, records have the number.
        self._classes: list[str] = getattr(known[config.answer], "names", None) or []
        self.files = sorted(Path(found.dataset_info.data_dir).glob("*.array_record*"))

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"TfdsSource({self._where}, {len(self)} records)"

    def __getitem__(self, index: int) -> Sample:
        """The sample of record ``index``.

        Raises:
          BadSample: a feature is not what the config says.
        """
        config, where = self._config, f"{self._where}, record {index}"
        try:
            record = self._records[index]
        except Exception as error:  # Here too.
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise BadSample("bad_record", f"sample ? ({where}): {reason}") from None
        images = [_feature(record, config.image)] if config.image else []
        if not all(isinstance(data, bytes) for data in images):
            raise BadSample("bad_image_field", f"sample ? ({where}): {config.image!r} is no image")
        identity = f"{config.name}-{index}"
        opened = tuple(
            EncodedImage(
                functools.partial(bytes, d), config.image, where, config.max_pixels, self._orientation
            )
            for d in images
        )
        if config.boxes:
            return Sample(identity, tuple(self._located(record, opened[0], where)), opened)
        messages = [
            {"role": role, "content": "<image>\n" * len(images) * (i == 0 and role == "user") + text}
            for i, pair in enumerate(self._pairs(record, where))
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        found = parse({"messages": messages}, where, default_id=identity, num_images=len(images))
        return Sample(identity, found.turns, opened)

    def _pairs(self, record: Any, where: str) -> list[tuple[str, str]]:
        """Questions and their answers."""
        config = self._config
        questions = _texts(_feature(record, config.question), where) if config.question else [config.prompt]
        found = _texts(_feature(record, config.answer), where, self._classes)
        answers = [text for text, _ in Counter(found).most_common()]
        if len(questions) == 1:
            questions *= len(answers)
        if len(questions) != len(answers):
            message = f"sample ? ({where}): {len(questions)} questions for {len(answers)} answers"
            raise BadSample("bad_conversation", message)
        return list(zip(questions, answers, strict=True))

    def _located(self, record: Any, image: EncodedImage, where: str) -> Iterator[Turn]:
        """For every phrase, where all that it names is: ymin, xmin, ymax, xmax in shares of the picture."""
        found = _list(_feature(record, self._config.answer))
        phrases = [_texts(several, where, self._classes) if _list(several) else [] for several in found]
        try:
            boxes: np.ndarray = np.array(_feature(record, self._config.boxes), np.float64)
        except (ValueError, TypeError):
            boxes = np.zeros(0)
        if not any(phrases):
            raise BadSample("no_boxes", f"sample ? ({where}): there are no phrases")
        if boxes.shape != (len(phrases), 4) or not ((boxes >= 0) & (boxes <= 1)).all():  # NaN is neither
            raise BadSample("bad_box", f"sample ? ({where}): needs a box in 0..1 for each of its phrases")
        frame = declared_frame(None, [image.frame()], f"sample ? ({where})")
        width, height = frame.declared
        named: dict[str, list[Box]] = {}
        for several, (top, left, bottom, right) in zip(phrases, boxes.tolist(), strict=True):
            if left >= right or top >= bottom:
                raise BadSample("bad_box", f"sample ? ({where}): the box of {str(several)[:80]} has no area")
            for phrase in dict.fromkeys(several):
                if not phrase.strip() or any(mark in phrase for mark in (*SPECIAL, IMAGE_PLACEHOLDER)):
                    raise BadSample("bad_box", f"sample ? ({where}): a phrase is blank or holds a mark")
                corners = (left * width, top * height, right * width, bottom * height)
                box = Box(phrase, frame.place(corners))
                named.setdefault(phrase, []).append(box)
        for number, (phrase, own) in enumerate(named.items()):
            question = f"{IMAGE_PLACEHOLDER}\n" * (number == 0) + self._config.prompt.replace("{}", phrase)
            answer = write_boxes(own, width=frame.size[0], height=frame.size[1])
            yield Turn(question, answer, "grounding", "", tuple(own))


def _features(features: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All features by name, ``a/b`` for b within a; of a list of features, what it is a list of."""
    for name, inner in features.items() if hasattr(features, "items") else ():
        inner = getattr(inner, "feature", inner)
        yield prefix + name, inner
        yield from _features(inner, f"{prefix}{name}/")


def _feature(record: Any, path: str) -> Any:
    """What a path leads to, or None; a name may have a slash of its own, as ``image/id``."""
    if isinstance(record, list):
        return [_feature(inner, path) for inner in record]
    if not isinstance(record, dict):
        return None
    if path in record:
        return record[path]
    head, slash, rest = path.partition("/")
    return _feature(record.get(head), rest) if slash else None


def _list(value: Any) -> list[Any]:
    """Something or several, as they come: a list or an array."""
    values = value.tolist() if hasattr(value, "tolist") else value
    return values if isinstance(values, list) else [values]


def _texts(value: Any, where: str, classes: Sequence[str] = ()) -> list[str]:
    """One text or several, as bytes, str, or numbers of classes."""
    texts = [_text(v, classes) for v in _list(value)]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise BadSample("bad_conversation", f"sample ? ({where}): expected a text or a list of texts")
    return texts


def _text(value: Any, classes: Sequence[str]) -> Any:
    """A text as such, what is no text as it is."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    is_class = isinstance(value, int | np.integer) and 0 <= value < len(classes)
    return classes[int(value)] if is_class else value
