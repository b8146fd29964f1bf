"""Data sets of TensorFlow Datasets by name, prepared in the ArrayRecord format; TensorFlow is not needed.

tfds build --file_format=array_record coco_captions
TfdsConfig("coco", "coco_captions", answer="captions/text", prompt="Describe the picture.")
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl_jax.data.conversation import parse
from vl_jax.data.sample import DEFAULT_MAX_PIXELS, BadSample, EncodedImage, Sample


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
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self):
        for field in ("name", "dataset", "split", "answer"):
            if not getattr(self, field):
                raise ValueError(f"{field}='' of source {self.name!r}: must not be empty")
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
        names = {f for f in (config.image, config.question, config.answer) if f}
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
        questions = _texts(_feature(record, config.question), where) if config.question else [config.prompt]
        answers = [text for text, _ in Counter(_texts(_feature(record, config.answer), where)).most_common()]
        if len(questions) == 1:
            questions *= len(answers)
        if len(questions) != len(answers):
            message = f"sample ? ({where}): {len(questions)} questions for {len(answers)} answers"
            raise BadSample("bad_conversation", message)
        images = [_feature(record, config.image)] if config.image else []
        if not all(isinstance(data, bytes) for data in images):
            raise BadSample("bad_image_field", f"sample ? ({where}): {config.image!r} is no image")
        pairs = list(zip(questions, answers, strict=True))
        messages = [
            {"role": role, "content": "<image>\n" * len(images) * (i == 0 and role == "user") + text}
            for i, pair in enumerate(pairs)
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        identity = f"{config.name}-{index}"
        found = parse({"messages": messages}, where, default_id=identity, num_images=len(images))
        where = f"sample {identity} ({where})"
        opened = (
            EncodedImage(functools.partial(bytes, d), config.image, where, config.max_pixels) for d in images
        )
        return Sample(identity, found.turns, tuple(opened))


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
