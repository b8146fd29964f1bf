"""The processor of published DeepSeek-VL and LLaVA checkpoints: a picture is one run of marks in the text.

    conversation --the folder's ChatTemplate, or else Format--> "User: <mark>What is it?\\n\\nAssistant:"
                 --every mark as often as a picture has tokens, the checkpoint's tokenizer--> tokens
    picture      --ImageProcessor--> normalised pixels, of one resolution or two

The text is read as the published processors read it: special tokens written in it become their ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vl_jax.batch import FIELDS, Batch, Field
from vl_jax.data.images.pixels import ImageProcessor, load_image_processor
from vl_jax.data.picture import Orientation
from vl_jax.data.published.request import Message, Picture, Request, templated, to_sample
from vl_jax.data.published.stops import Stops, read_stops
from vl_jax.data.published.vocabulary import PublishedTokenizer
from vl_jax.data.sample import IMAGE_PLACEHOLDER, Sample
from vl_jax.data.text.chat_template import ChatTemplate

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
    template: ChatTemplate | None = None  # the folder's own; without one, ``format``
    stops: Stops = Stops()  # beside the tokenizer's end token

    def __post_init__(self):
        made = {view.name for view in self.images.views}
        if made != set(self.shapes):
            raise ValueError(
                f"the image processor makes {sorted(made)}, the model takes {sorted(self.shapes)}"
            )

    @classmethod
    def load(cls, folder: str | Path, **settings: Any) -> PictureTextProcessor:
        """Reads what a checkpoint's folder says of pictures, tokens, conversations and the ends of answers.

        Args:
          settings: the other fields.

        Raises:
          ValueError: a file is missing or malformed, or does not go with the model.
        """
        tokenizer, template = PublishedTokenizer(folder), ChatTemplate.load(folder)
        stops = read_stops(folder, tokenizer.added, template)
        return cls(tokenizer, load_image_processor(folder), **settings, template=template, stops=stops)

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
        mark = self.tokenizer.text_of(self.image_token)
        text = prompt if prompt is not None else self._text(sample, mark, inference=inference)
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

    @property
    def pictures(self) -> str:
        """How pictures are read, in words."""
        return str(self.images)

    def prompts(self, requests: Sequence[Request]) -> Batch:
        """Conversations that are to be answered, as rows of a batch, padded before them.

        Raises:
          ValueError: as for one of them.
        """
        return stacked([self(conversations=r.conversation, images=r.images) for r in requests])

    def _encode(self, text: str, mark: str) -> list[int]:
        bos = self.tokenizer.bos_text
        complete = self.template is not None and bos is not None and text.startswith(bos)
        return self.tokenizer.encode(
            text.replace(IMAGE_PLACEHOLDER, mark * self.image_tokens), complete=complete
        )

    def _text(self, sample: Sample, mark: str, *, inference: bool) -> str:
        if self.template is None:
            return self.format.text(sample, eos=self.tokenizer.eos_text, inference=inference)
        # Some templates write a picture as the checkpoint's own mark.
        return templated(self.template, sample, inference=inference).replace(mark, IMAGE_PLACEHOLDER)

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


def stacked(rows: Sequence[Batch]) -> Batch:
    """Rows of one sequence each as one batch: padding stands before the tokens, and behind the pictures.

    A row's visual tokens count its own tiles, so that more tiles behind them change nothing.
    """

    length = max(row.tokens.shape[1] for row in rows)
    rows = [
        dataclasses.replace(row, visual_start=row.visual_start + np.int32(length - row.tokens.shape[1]))
        for row in rows
    ]

    def column(name: str) -> np.ndarray | None:
        values, field = [getattr(row, name) for row in rows], FIELDS.get(name, Field(()))
        if values[0] is None:
            return None
        most = max(value.shape[1] for value in values)

        def padded(value: np.ndarray) -> np.ndarray:
            more = most - value.shape[1]
            ends = (more, 0) if field.axes == ("T",) else (0, more)
            others = [(0, 0)] * (value.ndim - 2)
            return np.pad(value, [(0, 0), ends, *others], constant_values=field.padding)

        return np.concatenate([padded(value) for value in values])

    columns: dict[str, Any] = {name: column(name) for name in (*FIELDS, "high_tiles")}
    return Batch(**columns)


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
