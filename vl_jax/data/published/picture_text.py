"""The processor of published DeepSeek-VL and LLaVA checkpoints: a picture is one run of marks in the text.

    conversation --Format--> "User: <mark>What is it?\\n\\nAssistant:"
                 --every mark as often as a picture has tokens, the checkpoint's tokenizer--> tokens
    picture      --ImageProcessor--> normalised pixels, of one resolution or two

The text is read as the published processors read it: special tokens written in it become their ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from vl_jax.batch import Batch
from vl_jax.data.images.pixels import ImageProcessor, load_image_processor
from vl_jax.data.picture import Orientation
from vl_jax.data.published.request import Message, Picture, Request, to_sample
from vl_jax.data.sample import IMAGE_PLACEHOLDER, Sample

LOW, HIGH = "pixel_values", "high_res_pixel_values"  # what image processors call their views


@dataclass(frozen=True)
class Format:
    """How a conversation becomes one text; ``{eos}`` stands for the end token."""

    system: str  # used where the conversation has no system text
    after_system: str
    user: str
    assistant: str
    after_user: str
    after_assistant: str

    def text(self, sample: Sample, *, eos: str, inference: bool) -> str:
        """The text of a conversation; for inference it ends where the last answer would begin."""
        system = sample.system.strip() or self.system
        parts = [system + self.after_system] if system else []
        for turn in sample.turns:
            parts.append(f"{self.user} {turn.question.strip()}{self.after_user}{self.assistant}")
            if turn is not sample.turns[-1] or not inference:
                parts.append(f" {turn.answer.strip()}{self.after_assistant.format(eos=eos)}")
        return "".join(parts)


class PublishedTokenizer:
    """A checkpoint's own ``tokenizer.json``, with whatever it puts before a text."""

    def __init__(self, folder: str | Path):
        file, config_file = Path(folder) / "tokenizer.json", Path(folder) / "tokenizer_config.json"
        if not file.is_file():
            raise ValueError(f"tokenizer={str(folder)!r}: no such file {file}")
        try:
            self._plain = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # The library raises bare ``Exception`` for a malformed file.
            raise ValueError(f"{file}: not a tokenizer file: {error}") from None
        try:
            config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
            eos = config.get("eos_token") or "</s>"
            self.eos_text: str = eos["content"] if isinstance(eos, Mapping) else eos
        except (ValueError, KeyError, AttributeError):
            raise ValueError(f"{config_file}: not a tokenizer config") from None
        found = self._plain.token_to_id(self.eos_text)
        if found is None:
            raise ValueError(f"{file}: the vocabulary lacks the end token {self.eos_text!r}")
        self.eos: int = found

    def encode(self, text: str, *, complete: bool = False) -> list[int]:
        """The ids of a text as the checkpoint reads it, special tokens in it included.

        Args:
          complete: the text has all special tokens; otherwise the tokenizer puts its own around it.
        """
        return self._plain.encode(text, add_special_tokens=not complete).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; incomplete UTF-8 shows as U+FFFD."""
        return self._plain.decode(list(ids), skip_special_tokens=False)

    def text_of(self, token: int) -> str:
        """The entry of the vocabulary with this id.

        Raises:
          ValueError: there is none.
        """
        found = self._plain.id_to_token(token)
        if found is None:
            raise ValueError(f"token {token}: not in the vocabulary of the tokenizer")
        return found


@dataclass(frozen=True)
class PictureTextProcessor:
    """Turns what a user says into a ``Batch``."""

    tokenizer: PublishedTokenizer
    images: ImageProcessor
    format: Format
    image_token: int  # the id of the mark
    image_tokens: int  # how many of them stand for a picture
    shapes: Mapping[str, tuple[int, int, int]]  # what the model takes of each view of a picture: h, w, c
    max_tokens: int  # the context
    orientation: Orientation = "shown"  # of picture files: the published code loads them so

    def __post_init__(self):
        made = {view.name for view in self.images.views}
        if made != set(self.shapes):
            raise ValueError(
                f"the image processor makes {sorted(made)}, the model takes {sorted(self.shapes)}"
            )

    @classmethod
    def load(cls, folder: str | Path, **settings: Any) -> PictureTextProcessor:
        """Reads ``preprocessor_config.json`` and the tokenizer of a checkpoint's folder.

        Args:
          settings: the other fields.

        Raises:
          ValueError: a file is missing or malformed, or does not go with the model.
        """
        return cls(PublishedTokenizer(folder), load_image_processor(folder), **settings)

    def __call__(
        self,
        *,
        conversations: Sequence[Message] = (),
        prompt: str | None = None,
        images: Sequence[Picture] | None = None,
        inference: bool = True,
    ) -> Batch:
        """The batch, of one row, of a conversation or of a raw prompt; it holds no targets.

        Args: see ``Request``.

        Raises:
          ValueError: the conversation is malformed (roles, turns, images), or longer than the context.
        """
        request = Request(conversations, prompt, images, inference)
        sample = to_sample(request, name="conversation", orientation=self.orientation)
        text = prompt if prompt is not None else self._text(sample, inference=inference)
        mark = self.tokenizer.text_of(self.image_token)
        tokens = np.array(self._encode(text, mark), np.int32)
        visual = tokens == self.image_token
        expected = len(sample.images) * self.image_tokens
        if visual.sum() != expected:
            raise ValueError(
                f"conversation: {visual.sum()} tokens {mark!r}, {len(sample.images)} images need {expected}; "
                f"images are marked with {IMAGE_PLACEHOLDER}"
            )
        if len(tokens) > self.max_tokens:
            raise ValueError(
                f"conversation: {len(tokens)} tokens ({expected} of them visual), the context has "
                f"{self.max_tokens}"
            )
        views = [self.images(np.asarray(picture())) for picture in sample.images]
        pixels = {name: self._stack(views, name) for name in self.shapes}
        return make_row(tokens, visual, pixels[LOW], pixels.get(HIGH))

    def _encode(self, text: str, mark: str) -> list[int]:
        return self.tokenizer.encode(text.replace(IMAGE_PLACEHOLDER, mark * self.image_tokens))

    def _text(self, sample: Sample, *, inference: bool) -> str:
        return self.format.text(sample, eos=self.tokenizer.eos_text, inference=inference)

    def _stack(self, views: Sequence[Mapping[str, np.ndarray]], name: str) -> np.ndarray:
        """A view of every picture, f32[1 M h w c]; one of zeros without any."""
        shape = self.shapes[name]
        for view in views:
            if view[name].shape != shape:
                raise ValueError(
                    f"{name}: the image processor makes {view[name].shape}, the model takes {shape}"
                )
        stacked = [view[name].astype(np.float32) for view in views] or [np.zeros(shape, np.float32)]
        return np.stack(stacked)[None]


def make_row(tokens: np.ndarray, visual: np.ndarray, low: np.ndarray, high: np.ndarray | None) -> Batch:
    """A row that holds nothing but the tokens, and the pictures one after the other."""
    count, ones = int(visual.sum()), np.ones((1, len(tokens)), np.int32)
    padding = (0, int(count == 0))  # a model looks up visual tokens even where none is wanted
    blank = np.zeros((1, 1), np.int32)
    return Batch(
        tokens=tokens[None],
        positions=np.arange(len(tokens), dtype=np.int32)[None],
        segment_ids=ones,
        branch_ids=0 * ones,
        visual_slot=np.where(visual, np.cumsum(visual) - 1, -1).astype(np.int32)[None],
        target_index=blank,
        targets=blank,
        loss_weights=np.zeros((1, 1), np.float32),
        tiles=low,
        visual_index=np.pad(np.arange(count, dtype=np.int32), padding, constant_values=-1)[None],
        visual_start=np.pad(np.flatnonzero(visual), padding, constant_values=len(tokens))[None].astype(
            np.int32
        ),
        visual_segment_ids=np.pad(np.ones(count, np.int32), padding)[None],
        high_tiles=high,
    )
