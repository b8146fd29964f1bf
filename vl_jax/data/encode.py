"""Samples to padded batches: text, tiles and layout meet here.

``Encoder.example`` turns one sample into unpadded arrays, ``Encoder.collate`` lays examples out in rows
of static shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vl_jax.data.config import DataConfig, Decoding, ModelSpec, RowField, check_packing
from vl_jax.data.example import Example
from vl_jax.data.files.memory_cache import MemoryCache
from vl_jax.data.images.phrases import Phrases, has_phrases
from vl_jax.data.images.spatial import cut_labels, is_spatial
from vl_jax.data.images.tiles import Pictures, read_pictures
from vl_jax.data.images.tiling import (
    TilingConfig,
    best_grid,
    max_visual_tokens,
    num_views_tiles,
    num_visual_tokens,
    shown,
)
from vl_jax.data.sample import BadSample, Sample, each, image_size
from vl_jax.data.text import chat
from vl_jax.data.text.bounded import bounded
from vl_jax.data.text.negatives import NegativeTexts
from vl_jax.data.text.tokenizer import GROUNDING, Tokenizer, load_tokenizer
from vl_jax.data.text.written import encode_written, written

if TYPE_CHECKING:
    from vl_jax.batch import Batch
else:
    Batch = Any  # Worker processes encode and make no batches; without JAX they start in no time.


@dataclass(frozen=True)
class Encoder:
    """The static sizes of a pipeline, and the functions that fill them."""

    tokenizer: Tokenizer
    tiling: TilingConfig
    spec: ModelSpec
    max_tokens: int  # T
    max_tiles: int  # M
    max_targets: int  # Q
    decoding: Decoding = "whole"
    negatives: int = 0  # wrong texts beside a text
    cache: MemoryCache = field(default_factory=lambda: MemoryCache(0), compare=False)  # of pictures

    def __post_init__(self):
        if self.tokenizer.vocab_size > self.spec.vocab_size:
            raise ValueError(
                f"vocab_size={self.spec.vocab_size} of the model: the tokenizer has "
                f"{self.tokenizer.vocab_size} entries, it must be at least that"
            )
        if self.negatives and self.spec.reads != "text":
            raise ValueError(
                f"data.conversation.negatives={self.negatives} with a model that reads {self.spec.reads!r}: "
                "must be None, for only a text that is read alone, as by joint models, can have wrong ones"
            )

    @property
    def media(self) -> tuple[RowField, ...]:
        """The inputs of a row beside text and tiles."""
        if not self.negatives:
            return self.spec.media
        return (*self.spec.media, NegativeTexts(self.tokenizer, self.negatives, self.max_tokens))

    @property
    def row_bytes(self) -> int:
        """The most that the arrays of the examples in a row take, with a few bytes between them."""
        pixels = self.max_tiles * self.tiling.tile_size**2 * 3
        return pixels + 4 * (6 * self.max_tokens + 2 * self.max_visual_tokens) + 8 * self.max_tokens

    @property
    def max_visual_tokens(self) -> int:
        """S, the visual tokens of a row: what ``max_tiles`` tiles can give, and what fits the sequence."""
        side = self.spec.tile_tokens_side
        most = max_visual_tokens(self.tiling, tile_tokens_side=side, max_tiles=self.max_tiles)
        return min(most, self.max_tokens) if self.spec.fusion == "prefix" else most

    def example(
        self, sample: Sample, *, turns: chat.Turns = "dialogue", targets: chat.Targets = "answers"
    ) -> Example:
        """Encodes a sample for training; turns that do not fit ``max_tokens`` are left out.

        For a model that reads ``text`` it is the text alone, see ``written``, whatever is asked for.

        Raises:
          BadSample: an image cannot be used, or the sample does not fit.
        """
        (result,) = self.examples([sample], turns=turns, targets=targets)
        if isinstance(result, BadSample):
            raise result
        return result

    def examples(
        self, samples: Sequence[Sample | BadSample], *, turns: chat.Turns, targets: chat.Targets
    ) -> list[Example | BadSample]:
        """What ``example`` gives for each sample, or raises."""

        def dialogue(sample: Sample, pictures: Pictures) -> chat.Dialogue:
            lengths, most = self._image_lengths(pictures), self.max_tokens
            sample = bounded(sample, self.tokenizer, most)
            if self.spec.reads == "text":
                return encode_written(sample, self.tokenizer, max_tokens=most, wordless=self.spec.wordless)
            return chat.encode_dialogue(
                sample, self.tokenizer, image_lengths=lengths, turns=turns, targets=targets, max_tokens=most
            )

        pictures = each(self._pictures, samples)
        found = each(self._assemble, samples, each(dialogue, samples, pictures), pictures)
        return each(self._predicting, found)

    def draws(
        self,
        samples: Sequence[Sample | BadSample],
        chosen: Sequence[Sequence[int]],
        *,
        turns: chat.Turns,
        targets: chat.Targets,
    ) -> list[Example | BadSample]:
        """Encodes some turns of each sample for training (see ``chat.keep_turns``), whatever room they need.

        One that cannot be used is a ``BadSample``.
        """

        def dialogue(sample: Sample, pictures: Pictures, chosen: Sequence[int]) -> chat.Dialogue:
            lengths = self._image_lengths(pictures)
            sample = bounded(sample, self.tokenizer, self.max_tokens)
            whole = chat.encode_dialogue(
                sample, self.tokenizer, image_lengths=lengths, turns=turns, targets=targets
            )
            return chat.keep_turns(whole, turns, chosen)

        pictures = each(self._pictures, samples)
        return each(self._assemble, samples, each(dialogue, samples, pictures, chosen), pictures)

    def room_of(self, sizes: Sequence[tuple[int, int]]) -> tuple[int, list[int]]:
        """What the images of one sample take: tiles in all, and sequence positions of each.

        Args:
          sizes: width and height of each image in pixels.
        """
        grids = [best_grid(*size, self.tiling, num_images=len(sizes)) for size in sizes]
        tiles = sum(num_views_tiles(g, self.tiling.views) for g in grids)
        side, views = self.spec.tile_tokens_side, self.tiling.views
        if self.spec.fusion != "prefix":
            return tiles, [1] * len(sizes)
        return tiles, [num_visual_tokens(g, tile_tokens_side=side, views=views) for g in grids]

    def text_length(self, text: str) -> int:
        """The number of tokens of what somebody wrote."""
        return len(self.tokenizer.encode(text, allowed=GROUNDING if self.spec.reads == "dialogue" else ()))

    def prompt(self, sample: Sample) -> Example:
        """Encodes a conversation up to where the answer of its last turn begins; a text as ``example`` does.

        Raises:
          BadSample: an image cannot be used, or the prompt does not fit.
        """
        if self.spec.reads == "text":
            return self.example(sample)
        pictures = self._pictures(sample)
        lengths = self._image_lengths(pictures)
        sample = bounded(sample, self.tokenizer, self.max_tokens)
        dialogue = chat.encode_prompt(sample, self.tokenizer, image_lengths=lengths)
        return self._assemble(sample, self._fitting(sample, dialogue), pictures)

    def text(
        self,
        sample: Sample,
        *,
        wrapped: bool = False,
        complete: bool = True,
        allowed: Sequence[str] = chat.VERBATIM,
    ) -> Example:
        """Encodes a raw text (the question of the only turn); for the arguments see ``chat.encode_text``.

        Raises:
          BadSample: an image cannot be used, or the text does not fit.
        """
        pictures = self._pictures(sample)
        sample = bounded(sample, self.tokenizer, self.max_tokens)
        dialogue = chat.encode_text(
            sample,
            self.tokenizer,
            image_lengths=self._image_lengths(pictures),
            wrapped=wrapped,
            complete=complete,
            allowed=allowed,
        )
        return self._assemble(sample, self._fitting(sample, dialogue), pictures)

    def collate(self, rows: Sequence[Sequence[Example]], *, length: int = 0, pad_left: bool = False) -> Batch:
        """Lays rows of examples out as a batch of static shapes.

        Args:
          rows: the examples of each row; they become segments 1, 2, ...
          length: sequence length of the batch; 0 means ``max_tokens``.
          pad_left: padding before the row (for generation) instead of after it.

        Raises:
          ValueError: a row does not fit.
        """
        from vl_jax.data.collate import RowSizes, collate

        sizes = RowSizes(
            tokens=length or self.max_tokens,
            tiles=self.max_tiles,
            tile_size=self.tiling.tile_size,
            tile_tokens=self.spec.tile_tokens_side**2,
            visual=self.max_visual_tokens,
            targets=self.max_targets,
            labels=self.spec.labels,
            media=self.media,
        )
        return collate(rows, sizes, padding_id=self.tokenizer.pad, pad_left=pad_left)

    def _fitting(self, sample: Sample, dialogue: chat.Dialogue) -> chat.Dialogue:
        if len(dialogue.tokens) > self.max_tokens:
            message = (
                f"sample {sample.id}: a prompt of {len(dialogue.tokens)} tokens or more, limit "
                f"{self.max_tokens}"
            )
            raise BadSample("too_long", message)
        return dialogue

    def _predicting(self, example: Example) -> Example:
        found = np.count_nonzero(example.loss_weights)
        if found > self.max_targets:
            message = f"sample {example.id}: {found} tokens to predict, limit {self.max_targets}"
            raise BadSample("too_many_targets", message)
        return example

    def _pictures(self, sample: Sample) -> Pictures:
        side, most, quick = self.spec.tile_tokens_side, self.max_tiles, self.decoding == "reduced"
        return read_pictures(
            sample, self.tiling, tile_tokens_side=side, max_tiles=most, quick=quick, cache=self.cache
        )

    def _image_lengths(self, pictures: Pictures) -> list[int]:
        return [len(item) if self.spec.fusion == "prefix" else 1 for item in pictures.layouts]

    def _assemble(self, sample: Sample, dialogue: chat.Dialogue, pictures: Pictures) -> Example:
        prefix = self.spec.fusion == "prefix"
        index = [pictures.layouts[run.image] for run in dialogue.visual_runs]
        slots = np.full(len(dialogue.tokens), -1, np.int32)
        starts = np.zeros(sum(map(len, index)), np.int32)
        total = 0
        for run, layout in zip(dialogue.visual_runs, index, strict=True):
            here, total = total, total + len(layout)
            starts[here:total] = run.start
            if prefix:
                starts[here:total] += np.arange(len(layout), dtype=np.int32)
                slots[run.start : run.start + len(layout)] = np.arange(here, total, dtype=np.int32)
        return Example(
            id=sample.id,
            tokens=dialogue.tokens,
            targets=dialogue.targets,
            loss_weights=dialogue.loss_weights,
            positions=dialogue.positions,
            branch_ids=dialogue.branch_ids,
            visual_slot=slots,
            tiles=pictures.tiles,
            visual_index=np.concatenate(index) if index else np.zeros(0, np.int32),
            visual_start=starts,
            num_turns=dialogue.num_turns,
            grids=pictures.grids,
            answer_runs=dialogue.answer_runs,
            media=_read(sample, self.media, "bad_media"),
            labels=_read(self._in_tokens(self._in_tile(sample)), self.spec.labels, "bad_label"),
        )

    def _in_tile(self, sample: Sample) -> Sample:
        """The sample with labels that lie in its first picture as the first tile of it shows them."""
        if not self.spec.labels or not is_spatial(sample.labels):
            return sample
        if not sample.images:
            raise BadSample("bad_label", f"sample {sample.id}: labels that lie in a picture, and no picture")
        size = image_size(sample.images[0])
        try:
            labels = cut_labels(sample.labels, shown(size, self.tiling), size)
        except BadSample as error:
            raise BadSample(error.reason, f"sample {sample.id}: {error.args[1]}") from None
        return dataclasses.replace(sample, labels=labels)

    def _in_tokens(self, sample: Sample) -> Sample:
        """The sample with labels that lie in its text as spans of its row's tokens, where texts are read."""
        if not self.spec.labels or not has_phrases(sample.labels) or self.spec.reads != "text":
            return sample
        text, (before, after) = written(sample), self.tokenizer.around
        room = max(self.max_tokens - len(before) - len(after), 0)
        places = self.tokenizer.places(text)
        labels = {
            name: label.in_tokens(places, len(text), first=len(before), room=room)
            if isinstance(label, Phrases)
            else label
            for name, label in sample.labels.items()
        }
        return dataclasses.replace(sample, labels=labels)


def _read(sample: Sample, fields: Sequence[RowField], reason: str) -> dict[str, np.ndarray]:
    """What a sample has of some fields, by their names."""
    found = {}
    for field_ in fields:
        value = field_.read(sample)
        if value is None:
            continue
        if not _fits(value, field_) or value.dtype != np.dtype(field_.dtype):
            message = (
                f"sample {sample.id}: {field_.name} of {value.dtype}{list(value.shape)}, must be "
                f"{field_.dtype}{list(field_.shape)}"
            )
            raise BadSample(reason, message)
        found[field_.name] = np.asarray(value)
    return found


def _fits(value: np.ndarray, field_: RowField) -> bool:
    """Whether an array has the shape of a field."""
    shape = tuple(field_.shape)
    if not getattr(field_, "varies", False):
        return value.shape == shape
    return value.ndim == len(shape) and value.shape[1:] == shape[1:] and len(value) <= shape[0]


def make_encoder(config: DataConfig, spec: ModelSpec, *, targets: chat.Targets = "all") -> Encoder:
    """The encoder of a data config for a model.

    Args:
      targets: what its rows predict; rows of answers need room for ``max_answer_tokens`` targets only.

    Raises:
      ValueError: the tokenizer cannot be read, or has more entries than the model.
    """
    answers = config.max_answer_tokens if targets == "answers" else None
    negatives = config.conversation.negatives
    return Encoder(
        tokenizer=load_tokenizer(config.tokenizer, reads=spec.reads),
        tiling=config.tiling,
        spec=spec,
        max_tokens=config.max_tokens,
        max_tiles=config.max_tiles,
        max_targets=min(answers or config.max_tokens, config.max_tokens),
        decoding=config.decoding,
        negatives=negatives.count if negatives else 0,
        cache=MemoryCache((config.loading.cache_mb << 20) // max(config.loading.num_workers, 1)),
    )


def make_row_encoder(config: DataConfig, spec: ModelSpec, *, targets: chat.Targets) -> Encoder:
    """The encoder of training rows: with packing, rows are longer than a sample may be.

    Raises:
      ValueError: as ``make_encoder``, or the model cannot read such rows.
    """
    check_packing(config, spec)
    if config.packing is not None:
        row = config.packing
        config = dataclasses.replace(
            config,
            max_tokens=row.max_tokens,
            max_tiles=row.max_tiles,
            max_answer_tokens=row.max_answer_tokens,
            packing=None,
        )
    return make_encoder(config, spec, targets=targets)
