"""The processor of published DeepSeek-VL2 checkpoints: conversations and pictures in, a ``Batch`` out.

    processor = Processor.load("deepseek-vl2-tiny")
    batch = processor(
        conversations=[
            {"role": "<|User|>", "content": "<image>\\nWhat is it?", "images": ["cat.png"]},
            {"role": "<|Assistant|>", "content": ""},
        ]
    )

Token ids, tiles and layout are those of the data pipeline (``Encoder``). ``Processor.record`` gives the
arrays under the names, and with the unshifted labels, that the published processor gives them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64

from vl_jax.batch import Batch
from vl_jax.data.config import ModelSpec
from vl_jax.data.encode import Encoder
from vl_jax.data.example import Example
from vl_jax.data.images import tiling as tiles_lib
from vl_jax.data.picture import Orientation
from vl_jax.data.published.request import Message, Picture, Request, display_text, templated, to_sample
from vl_jax.data.published.stops import Stops, read_stops
from vl_jax.data.sample import IMAGE_PLACEHOLDER, Sample, Turn
from vl_jax.data.text.chat_template import ChatTemplate
from vl_jax.data.text.tokenizer import BOS, Tokenizer, load_published_tokenizer
from vl_jax.runtime import json_text

Padding = Literal["left", "right"]

IGNORED = -100  # the label of a position that is no target

_UNLIMITED = 1 << 31
_TILE_MULTIPLE = 4  # of prompts: batches whose tiles differ a little share a program


@dataclass(frozen=True)
class ProcessorConfig:
    """The ``processor_config.json`` of a checkpoint; absent keys have the published defaults."""

    candidate_resolutions: tuple[tuple[int, int], ...]  # (width, height) in pixels
    patch_size: int
    downsample_ratio: int
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    normalize: bool = True
    mask_prompt: bool = True  # whether users' and system text is no target
    ignore_id: int = IGNORED
    image_token: str = IMAGE_PLACEHOLDER
    sft_format: str = "deepseek"
    orientation: Orientation = "stored"  # the published code does not turn pictures as EXIF says

    def __post_init__(self):
        for name, allowed in (("image_token", IMAGE_PLACEHOLDER), ("sft_format", "deepseek")):
            if getattr(self, name) != allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be {allowed!r}")
        for name in ("patch_size", "downsample_ratio"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        side = self.image_size
        uneven = [size for size in self.candidate_resolutions if size[0] % side or size[1] % side]
        if uneven:
            raise ValueError(f"candidate_resolutions {uneven}: must be multiples of the tile, {side} pixels")

    @property
    def image_size(self) -> int:
        """Pixels on the side of a tile: the width of the first candidate."""
        return self.candidate_resolutions[0][0]

    @property
    def tile_tokens_side(self) -> int:
        """Visual tokens on the side of a tile."""
        return -(-(self.image_size // self.patch_size) // self.downsample_ratio)

    def tiling(self, views: tiles_lib.Views = "global_local") -> tiles_lib.TilingConfig:
        """How pictures are cut into tiles."""
        side = self.image_size
        red, green, blue = (int(255 * mean) for mean in self.image_mean)
        return tiles_lib.TilingConfig(
            tile_size=side,
            candidates=tuple((w // side, h // side) for w, h in self.candidate_resolutions),
            views=views,
            padding_colour=(red, green, blue),
            orientation=self.orientation,
        )


@dataclass(frozen=True)
class Record:
    """What the published processor returns for one sequence."""

    input_ids: Int64[np.ndarray, " T"]
    labels: Int64[np.ndarray, " T"]  # unshifted: the loss compares position t with label t + 1
    images_seq_mask: Bool[np.ndarray, " T"]
    images_spatial_crop: Int64[np.ndarray, "images 2"]  # tiles across, tiles down; one 0, 0 without images
    images: Float32[np.ndarray, "M 3 h w"]  # normalised; one zero tile without images
    num_image_tokens: Int64[np.ndarray, " pictures"]
    sft_format: str  # the conversation for display


@dataclass(frozen=True)
class RecordBatch:
    """Records padded to the same shapes, as the published processor batches them."""

    input_ids: Int64[np.ndarray, "B T"]
    labels: Int64[np.ndarray, "B T"]
    attention_mask: Bool[np.ndarray, "B T"]
    images_seq_mask: Bool[np.ndarray, "B T"]
    images_spatial_crop: Int64[np.ndarray, "B images 2"]
    images: Float32[np.ndarray, "B M 3 h w"]
    seq_lens: Int64[np.ndarray, " B"]
    sft_format: tuple[str, ...]


@dataclass(frozen=True)
class Processor:
    """Turns what a user says into the arrays a published checkpoint was trained on."""

    tokenizer: Tokenizer
    config: ProcessorConfig
    views: tiles_lib.Views = "global_local"
    max_tokens: int = 4096  # the context
    template: ChatTemplate | None = None  # the folder's own, for questions; without one, the published format
    stops: Stops = Stops()  # beside the tokenizer's end token

    @classmethod
    def load(cls, folder: str | Path, *, tokenizer: str | Path = "") -> Processor:
        """Reads the processor of a checkpoint's folder.

        Files: ``processor_config.json``, the tokenizer's, and if present ``config.json``, for the context
        length and the order of the views, a chat template, and whatever names stop tokens.

        Args:
          tokenizer: another folder to read the tokenizer from.

        Raises:
          ValueError: a file is missing or malformed.
        """
        folder = Path(folder)
        settings = _read_json(folder / "processor_config.json")
        names = {field.name for field in dataclasses.fields(ProcessorConfig)}
        given = {
            key: _frozen(value) for key, value in settings.items() if key in names and value not in (None, [])
        }
        missing = {"candidate_resolutions", "patch_size", "downsample_ratio"} - set(given)
        if missing:
            raise ValueError(f"{folder / 'processor_config.json'}: lacks {', '.join(sorted(missing))}")
        model = _read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        language = model.get("language_config") or {}
        read, template = load_published_tokenizer(tokenizer or folder), ChatTemplate.load(folder)
        return cls(
            tokenizer=read,
            config=ProcessorConfig(**given),
            views="global_local" if model.get("global_view_pos", "head") == "head" else "local_global",
            max_tokens=language.get("max_position_embeddings", cls.max_tokens),
            template=template,
            stops=read_stops(folder, read.added, template),
        )

    def __call__(
        self,
        *,
        conversations: Sequence[Message] | Sequence[Sequence[Message]] = (),
        prompt: str | None = None,
        images: Sequence[Picture] | Sequence[Sequence[Picture]] | None = None,
        inference: bool = True,
        wrap_prompt: bool = False,
        mask_prompt: bool | None = None,
        system_prompt: str = "",
        padding: Padding | None = None,
        length: int = 0,
        max_tiles: int = 0,
    ) -> Batch:
        """The batch of one conversation, of several, or of a raw prompt.

        Args:
          conversations: a list of messages, or a list of such lists (and so are the images then).
          padding: None is "left" for generation and "right" for training.
          length, max_tiles: static sizes of a row; 0 takes what the longest row needs.
          For the others see ``Request``.

        Raises:
          ValueError: see ``batch``.
        """
        several = bool(conversations) and not isinstance(conversations[0], Mapping)
        rows: Any = conversations if several else [conversations]
        pictures: Any = (images if several else [images]) if images is not None else [None] * len(rows)
        if len(pictures) != len(rows):
            raise ValueError(f"images: {len(pictures)} lists for {len(rows)} conversations")
        requests = [
            Request(messages, prompt, row, inference, wrap_prompt, mask_prompt, system_prompt)
            for messages, row in zip(rows, pictures, strict=True)
        ]
        side = padding or ("left" if inference else "right")
        return self.batch(requests, padding=side, length=length, max_tiles=max_tiles)

    def batch(
        self,
        requests: Sequence[Request],
        *,
        padding: Padding = "left",
        length: int = 0,
        max_tiles: int = 0,
        tile_multiple: int = 1,
    ) -> Batch:
        """Requests as rows of a batch; for training, its targets are the published labels.

        Args:
          tile_multiple: without ``max_tiles``, rows have room for a multiple of so many tiles.

        Raises:
          ValueError: a conversation is malformed (roles, turns, images, see ``Request``), longer than the
            context, or does not fit ``length`` or ``max_tiles``.
        """
        way = self.config.orientation
        samples = [to_sample(r, name=f"conversation {i}", orientation=way) for i, r in enumerate(requests)]
        tiles = max([self._smallest, *(self._num_tiles(sample) for sample in samples)])
        if max_tiles and max_tiles < tiles:
            raise ValueError(f"max_tiles={max_tiles}: the pictures need {tiles}")
        room = -(-tiles // tile_multiple) * tile_multiple
        encoder = self.encoder(max_tiles=max_tiles or room)
        pairs = zip(samples, requests, strict=True)
        examples = [self._example(encoder, sample, request) for sample, request in pairs]
        longest = max(len(e.tokens) for e in examples)
        if length and length < longest:
            raise ValueError(f"length={length}: the longest conversation has {longest} tokens")
        targets = max(np.count_nonzero(e.loss_weights) for e in examples)
        encoder = dataclasses.replace(encoder, max_tokens=length or longest, max_targets=max(int(targets), 1))
        return encoder.collate([[e] for e in examples], pad_left=padding == "left")

    def record(self, request: Request) -> Record:
        """What the published processor returns for one request.

        Raises:
          ValueError: as ``batch``.
        """
        c = self.config
        sample = to_sample(request, name="conversation", orientation=c.orientation)
        encoder = self.encoder(max_tiles=max(self._smallest, self._num_tiles(sample)))
        example = self._example(encoder, sample, request)
        visual = example.visual_slot >= 0
        tokens = example.tokens.astype(np.int64)
        supervised = np.full(len(tokens), not self._masks_prompt(request))
        for run in example.answer_runs:
            supervised[run.start : run.stop] = True
        supervised[0] = True  # BOS is its own label; no position before it predicts it.
        crops = np.array(example.grids or [(0, 0)], np.int64)
        pixels = self._normalise(example.tiles)
        lengths = [
            tiles_lib.num_visual_tokens(g, tile_tokens_side=c.tile_tokens_side, views=self.views)
            for g in example.grids
        ]
        return Record(
            input_ids=tokens,
            labels=np.where(supervised & ~visual, tokens, c.ignore_id),
            images_seq_mask=visual,
            images_spatial_crop=crops,
            images=pixels if example.grids else np.zeros((1, 3, c.image_size, c.image_size), np.float32),
            num_image_tokens=np.array(lengths, np.int64),
            sft_format=display_text(request),
        )

    def collate(self, records: Sequence[Record], *, padding: Padding = "left") -> RecordBatch:
        """Pads records as the published processor does: tiles and crops at the end, tokens on one side."""
        lengths = [len(r.input_ids) for r in records]
        left = [max(lengths) - n if padding == "left" else 0 for n in lengths]

        def rows(name: str, fill: int) -> np.ndarray:
            return np.stack(
                [
                    np.pad(getattr(r, name), (b, max(lengths) - n - b), constant_values=fill)
                    for r, n, b in zip(records, lengths, left, strict=True)
                ]
            )

        def stacks(name: str) -> np.ndarray:
            values = [getattr(r, name) for r in records]
            most = max(map(len, values))
            return np.stack([np.pad(v, [(0, most - len(v))] + [(0, 0)] * (v.ndim - 1)) for v in values])

        return RecordBatch(
            input_ids=rows("input_ids", self.tokenizer.pad),
            labels=rows("labels", self.config.ignore_id),
            attention_mask=rows("input_ids", -1) >= 0,
            images_seq_mask=rows("images_seq_mask", 0),
            images_spatial_crop=stacks("images_spatial_crop"),
            images=stacks("images"),
            seq_lens=np.array(lengths, np.int64),
            sft_format=tuple(r.sft_format for r in records),
        )

    @property
    def pictures(self) -> str:
        """How pictures are read, in words."""
        return str(self.config.tiling(self.views))

    def prompts(self, requests: Sequence[Request]) -> Batch:
        """Requests to answer, as rows of a batch of few different shapes; raises as ``batch``."""
        return self.batch(requests, tile_multiple=_TILE_MULTIPLE)

    @property
    def orientation(self) -> Orientation:
        """Which way up it reads picture files."""
        return self.config.orientation

    def encoder(self, *, max_tiles: int) -> Encoder:
        """An encoder for this checkpoint that limits nothing but the tiles of a row."""
        return Encoder(
            tokenizer=self.tokenizer,
            tiling=self.config.tiling(self.views),
            spec=ModelSpec(self.config.tile_tokens_side, "prefix", self.tokenizer.vocab_size),
            max_tokens=_UNLIMITED,
            max_tiles=max_tiles,
            max_targets=_UNLIMITED,
        )

    @property
    def _smallest(self) -> int:
        return tiles_lib.num_views_tiles((1, 1), self.views)

    def _num_tiles(self, sample: Sample) -> int:
        tiling, count = self.config.tiling(self.views), len(sample.images)
        grids = [tiles_lib.best_grid(*image().size, tiling, num_images=count) for image in sample.images]
        return sum(tiles_lib.num_views_tiles(grid, self.views) for grid in grids)

    def _masks_prompt(self, request: Request) -> bool:
        return self.config.mask_prompt if request.mask_prompt is None else request.mask_prompt

    def _example(self, encoder: Encoder, sample: Sample, request: Request) -> Example:
        if request.prompt is not None:
            example = encoder.text(sample, wrapped=request.wrap_prompt, complete=not request.inference)
        elif request.inference and self.template is not None:
            text = templated(self.template, sample, inference=True).removeprefix(BOS)
            sample = dataclasses.replace(sample, turns=(Turn(text, ""),), system="")
            allowed = tuple(mark for mark in self.tokenizer.added if mark != IMAGE_PLACEHOLDER)
            example = encoder.text(sample, complete=False, allowed=allowed)
        elif request.inference:
            example = encoder.prompt(sample)
        else:
            targets = "answers" if self._masks_prompt(request) else "text"
            example = encoder.example(sample, targets=targets)
        if len(example.tokens) > self.max_tokens:
            visual = len(example.visual_index)
            raise ValueError(
                f"{sample.id}: {len(example.tokens)} tokens ({visual} of them visual), the context has "
                f"{self.max_tokens}"
            )
        return example

    def _normalise(self, tiles: np.ndarray) -> np.ndarray:
        pixels = tiles.astype(np.float32) / np.float32(255)
        if self.config.normalize:
            mean, std = (np.array(v, np.float32) for v in (self.config.image_mean, self.config.image_std))
            pixels = (pixels - mean) / std
        return np.moveaxis(pixels, -1, 1)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"checkpoint: no such file {file}")
    try:
        result = json_text.read(file)
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(result, dict):
        raise ValueError(f"{file}: must hold an object")
    return result


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
