"""Data sets of TensorFlow Datasets by name, prepared in the ArrayRecord format; TensorFlow is not needed.

tfds build --file_format=array_record coco_captions
TfdsConfig("coco", "coco_captions", answer="captions/text", prompt="Describe the picture.")
TfdsConfig("where", "my_phrases", answer="objects/phrase", boxes="objects/bbox", prompt="Locate {}.")

Lists of lists, such as the expressions of ``ref_coco``, cannot be prepared without TensorFlow.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vl_jax.data.conversation import parse
from vl_jax.data.grounding import SPECIAL, write_boxes
from vl_jax.data.sample import (
    DEFAULT_MAX_PIXELS,
    IMAGE_PLACEHOLDER,
    BadSample,
    Box,
    EncodedImage,
    Sample,
    Turn,
)


@dataclass(frozen=True)
class TfdsConfig:
    """A prepared data set, and the features that a conversation is made of; ``a/b`` is b within a."""

    name: str
    dataset: str  # such as "vqa_v2" or "coco_captions/2014:1.1.0"
    split: str = "train"
    root: str = ""  # folder of prepared data sets relative to the data root; empty: the data root
    image: str = "image"  # empty: the data set has no images
    question: str = ""  # empty: ``prompt`` is the question
    answer: str = "answer"  # of a list, each different answer is a turn of its own, the most frequent first
    prompt: str = ""
    boxes: str = ""  # the answers are phrases, each for one of these; ``prompt``, with {}, asks where it is
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


class TfdsSource:
    """Random access to a prepared data set; nothing is downloaded.

    Raises (on opening):
      ValueError: it is not there, not prepared as ArrayRecord, or lacks a feature that the config names.
    """

    def __init__(self, config: TfdsConfig, *, root: str = "."):
        import tensorflow_datasets as tfds

        self._config = config
        folder = Path(root) / config.root
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
        missing = sorted(f for f in names if f.partition("/")[0] not in found.dataset_info.features)
        if missing:
            known = ", ".join(found.dataset_info.features)
            raise ValueError(
                f"source {config.name!r}: {self._where}: no feature {missing[0]!r}; there are {known}"
            )
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
        except (ValueError, RuntimeError, OSError, LookupError, TypeError) as error:
            raise BadSample("bad_record", f"sample ? ({where}): {error}") from None
        images = [_feature(record, config.image)] if config.image else []
        if not all(isinstance(data, bytes) for data in images):
            raise BadSample("bad_image_field", f"sample ? ({where}): {config.image!r} is no image")
        identity = f"{config.name}-{index}"
        opened = tuple(
            EncodedImage(functools.partial(bytes, d), config.image, where, config.max_pixels) for d in images
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
        answers = [text for text, _ in Counter(_texts(_feature(record, config.answer), where)).most_common()]
        if len(questions) == 1:
            questions *= len(answers)
        if len(questions) != len(answers):
            message = f"sample ? ({where}): {len(questions)} questions for {len(answers)} answers"
            raise BadSample("bad_conversation", message)
        return list(zip(questions, answers, strict=True))

    def _located(self, record: Any, image: EncodedImage, where: str) -> Iterator[Turn]:
        """For every phrase, where it is: boxes are ymin, xmin, ymax, xmax in shares of the picture."""
        phrases = _texts(_feature(record, self._config.answer), where)
        try:
            found: np.ndarray = np.array(_feature(record, self._config.boxes), np.float64)
        except (ValueError, TypeError):
            found = np.zeros(0)
        if found.shape != (len(phrases), 4) or not ((found >= 0) & (found <= 1)).all():  # NaN is neither
            raise BadSample("bad_box", f"sample ? ({where}): needs a box in 0..1 for each of its phrases")
        if any(mark in phrase for phrase in phrases for mark in SPECIAL):
            raise BadSample("bad_box", f"sample ? ({where}): a phrase holds a special mark")
        width, height = image.size()
        for number, (phrase, (top, left, bottom, right)) in enumerate(
            zip(phrases, found.tolist(), strict=True)
        ):
            if left >= right or top >= bottom:
                raise BadSample("bad_box", f"sample ? ({where}): the box of {phrase[:80]!r} has no area")
            corners = (left * width, top * height, right * width, bottom * height)
            box = Box(phrase, corners)
            answer = write_boxes([box], width=width, height=height)
            question = f"{IMAGE_PLACEHOLDER}\n" * (number == 0) + self._config.prompt.replace("{}", phrase)
            yield Turn(question, answer, "grounding", "", (box,))


def _feature(record: Any, path: str) -> Any:
    for key in path.split("/"):
        if isinstance(record, list):
            record = [inner.get(key) if isinstance(inner, dict) else None for inner in record]
        else:
            record = record.get(key) if isinstance(record, dict) else None
    return record


def _texts(value: Any, where: str) -> list[str]:
    """One text or several, as they come: bytes, str, a list or an array of them."""
    values = value.tolist() if hasattr(value, "tolist") else value
    values = values if isinstance(values, list) else [values]
    texts = [v.decode("utf-8", errors="replace") if isinstance(v, bytes) else v for v in values]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise BadSample("bad_conversation", f"sample ? ({where}): expected a text or a list of texts")
    return texts
