"""What the data side of an experiment varies: sources, text, pictures, packed rows, shared work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import Sample, Source
from vl_jax.data.sources.build import SourceConfig, open_source
from vl_jax.data.sources.negatives import NegativesConfig, WithNegatives
from vl_jax.data.text.chat import Targets, Turns
from vl_jax.data.text.synonyms import SynonymsConfig
from vl_jax.data.text.turns import TurnSampling

# How pictures become tiles: whole, as the published processors do; or quicker, JPEG files decoded at 1/2, 1/4
# or 1/8 of their size where the tiles need no more, and the overview made from the tiles of a square grid. It
# differs by about one grey level on average, the overview by two.
Decoding = Literal["whole", "reduced"]


@dataclass(frozen=True)
class SourceWeight:
    """The weight of one source."""

    name: str
    weight: float

    def __post_init__(self):
        if not self.weight >= 0:
            raise ValueError(f"weight={self.weight} of source {self.name!r}: must not be negative")


@dataclass(frozen=True)
class MixtureWarmup:
    """Weights that a stage begins with; over so many samples they move on a line to its own.

    DeepSeek-VL (section 3.2) begins with text almost alone.
    """

    samples: int
    weights: tuple[SourceWeight, ...]

    def __post_init__(self):
        if self.samples < 1:
            raise ValueError(f"samples={self.samples} of the mixture's warm-up: must be at least 1")
        if not any(w.weight for w in self.weights):
            raise ValueError("weights of the mixture's warm-up: one must be above 0")


@dataclass(frozen=True)
class PackingConfig:
    """Rows that hold several samples, one segment each; a sample's limits are in the data config."""

    max_tokens: int = 2048  # T, length of a row
    max_tiles: int = 16  # M, tiles of a row
    max_answer_tokens: int | None = None  # Q, tokens predicted in a row of answers; None: as many as T
    window: int = 4096  # draws that are packed together; rows are filled better by more
    index: str = ""  # folder for the lengths of the sources; empty: they are measured window by window
    warmup: MixtureWarmup | None = None
    tile_cost: float = 200.0  # operations of the encoder on a tile, over those of the decoder on a token
    attention_length: int = 4096  # tokens of a segment at which attention costs as much as all the rest

    def __post_init__(self):
        for name in ("max_tokens", "max_tiles", "window", "attention_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.max_answer_tokens is not None and self.max_answer_tokens < 1:
            raise ValueError(
                f"max_answer_tokens={self.max_answer_tokens}: must be at least 1, or None for all"
            )
        if self.tile_cost < 0:
            raise ValueError(f"tile_cost={self.tile_cost}: must not be negative")

    def cost(self, sizes: np.ndarray) -> float:
        """Estimated operations of a row, in those of one token through the decoder.

        Args:
          sizes: i64[n 3] tokens, tiles and predicted tokens of its items.
        """
        tokens, tiles = sizes[:, 0].astype(np.float64), sizes[:, 1]
        return float((tokens * (1 + tokens / self.attention_length)).sum() + self.tile_cost * tiles.sum())


@dataclass(frozen=True)
class ConversationConfig:
    """How conversations and texts become rows."""

    turns: Turns = "independent"  # each question by itself, or in a dialogue with those before it
    max_turns: int | None = None  # questions taken from a sample at each draw; None: all
    turn_sampling: TurnSampling = "first"  # which ones, where there are more
    merge_turns: int = 1  # ``convert-data`` makes one sample of so many questions about the same pictures
    long_text: Literal["skip", "split"] = "skip"  # what ``convert-data`` does with texts that do not fit
    negatives: NegativesConfig | None = None  # wrong texts beside each text, where a text is read alone
    synonyms: SynonymsConfig | None = None  # other words of the same meaning, in training

    def __post_init__(self):
        if self.merge_turns < 1:
            raise ValueError(f"merge_turns={self.merge_turns}: must be at least 1")
        if self.max_turns is not None and self.max_turns < 1:
            raise ValueError(f"max_turns={self.max_turns}: must be at least 1, or None for all")


@dataclass(frozen=True)
class LoadingConfig:
    """What the machine decides: how samples are read and encoded. It changes no batch."""

    num_threads: int = 1  # more pay where decoding large photographs takes longer than the rest
    num_workers: int = 0  # processes that read and encode instead of threads
    prefetch: int = 2  # batches made ahead of the training step
    cache_mb: int = 128  # MiB of records and tiles of files kept in memory, of all workers; 0: none

    def __post_init__(self):
        for name in ("num_threads", "prefetch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name, none in {"num_workers": "means threads", "cache_mb": "keeps nothing"}.items():
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative; 0 {none}")

    @property
    def parallel(self) -> int:
        """How many samples are worked on at a time."""
        return self.num_workers or self.num_threads


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and how they become batches."""

    MOVED: ClassVar[Mapping[str, str]] = {
        "turns": "conversation.turns",
        "max_turns": "conversation.max_turns",
        "turn_sampling": "conversation.turn_sampling",
        "merge_turns": "conversation.merge_turns",
        "long_text": "conversation.long_text",
        "num_threads": "loading.num_threads",
        "num_workers": "loading.num_workers",
        "prefetch": "loading.prefetch",
        "cache_mb": "loading.cache_mb",
    }

    root: str = "."  # folder that file names of the sources are relative to
    sources: tuple[SourceConfig, ...] = ()
    evaluation: tuple[SourceConfig, ...] = ()
    tokenizer: str = ""  # a tokenizer.json; empty means the shipped vocabulary
    max_tokens: int = 512  # T, length of a row
    max_tiles: int = 1  # M, tiles of a row
    max_answer_tokens: int | None = None  # Q, tokens predicted in a row of answers; None: as many as T
    conversation: ConversationConfig = field(default_factory=ConversationConfig)
    image_dropout_rate: float = 0.0  # share of the draws whose images are withheld
    tiling: TilingConfig = field(default_factory=TilingConfig)
    decoding: Decoding = "whole"
    augmentation: AugmentationConfig | None = None  # of pictures, in training; None: they stay as they are
    packing: PackingConfig | None = None  # rows of several samples in training; None: one sample a row
    seed: int = 0
    loading: LoadingConfig = field(default_factory=LoadingConfig)

    def __post_init__(self):
        for name in ("max_tokens", "max_tiles"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.max_answer_tokens is not None and self.max_answer_tokens < 1:
            raise ValueError(
                f"max_answer_tokens={self.max_answer_tokens}: must be at least 1, or None for all"
            )
        if not 0 <= self.image_dropout_rate <= 1:
            raise ValueError(f"image_dropout_rate={self.image_dropout_rate}: must lie in 0..1")
        self._check_packing()
        for group in (self.sources, self.evaluation):
            names = [s.name for s in group]
            if len(set(names)) < len(names):
                raise ValueError(f"source names {names}: must be different")

    def _check_packing(self) -> None:
        row = self.packing
        if row is None:
            return
        talk = self.conversation
        if talk.synonyms is not None:
            raise ValueError(
                "packing with conversation.synonyms: a text would change its length, set packing=None"
            )
        if talk.negatives is not None:
            raise ValueError(
                "packing with conversation.negatives: wrong texts stand beside one text, set packing=None"
            )
        if talk.turns == "dialogue" and (talk.max_turns is not None or talk.turn_sampling != "first"):
            raise ValueError(
                f"packing with conversation.turns='dialogue', max_turns={talk.max_turns}, turn_sampling="
                f"{talk.turn_sampling!r}: packed dialogues are whole; set conversation.max_turns=None and "
                "conversation.turn_sampling='first', or conversation.turns='independent'"
            )
        if self.augmentation is not None and self.augmentation.mosaic:
            raise ValueError(
                f"packing with augmentation.mosaic={self.augmentation.mosaic}: packed rows have no labels "
                "that lie in a picture; set packing to None, or mosaic to 0"
            )
        answers = row.max_answer_tokens or row.max_tokens
        limits = {
            "max_tokens": (self.max_tokens, row.max_tokens),
            "max_tiles": (self.max_tiles, row.max_tiles),
            "max_answer_tokens": (min(self.max_answer_tokens or self.max_tokens, self.max_tokens), answers),
        }
        for name, (sample, most) in limits.items():
            if sample > most:
                raise ValueError(f"packing.{name}={most}: must be at least {name}={sample} of one sample")


@runtime_checkable
class RowField(Protocol):
    """An array that a row may have beside its text and tiles: a label, or an input of another kind.

    One whose first axis is of any length up to that of ``shape`` says so by a field ``varies``.
    """

    @property
    def name(self) -> str:
        """Its name in ``Batch.labels`` or ``Batch.media``."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row."""
        ...

    @property
    def dtype(self) -> str:
        """As numpy names it."""
        ...

    def read(self, sample: Sample) -> np.ndarray | None:
        """The array of a sample; None if the sample has none.

        Raises:
          BadSample: the sample has one that cannot be used.
        """
        ...


@dataclass(frozen=True)
class ModelSpec:
    """What the data side must know of a model.

    With ``prefix`` fusion an image's visual tokens stand in the sequence, each at a position of its own;
    with ``gated`` fusion the sequence holds one placeholder an image, and text looks at the visual tokens
    on the side.
    """

    tile_tokens_side: int  # h: a tile becomes h * h tokens
    fusion: Literal["prefix", "gated"]
    vocab_size: int
    reads: Literal["dialogue", "text"] = "dialogue"  # text: what was written alone, without answers and marks
    labels: tuple[RowField, ...] = ()  # what rows are to be told apart by
    media: tuple[RowField, ...] = ()  # inputs beside text and tiles
    targets: tuple[Targets, ...] = ("all", "answers", "text")  # what its rows may predict
    wordless: bool = False  # a sample of which nothing is written has no token, not even that of the end

    def __post_init__(self):
        if self.reads == "text" and self.fusion == "prefix":
            raise ValueError("reads='text' with fusion='prefix': images stand beside a text, set 'gated'")
        for kind in ("labels", "media"):
            names = [field.name for field in getattr(self, kind)]
            if len(set(names)) < len(names):
                raise ValueError(f"{kind} of the model: names {names} must be different")

    @property
    def packs(self) -> bool:
        """Whether a row may hold several samples: not where a row is one text, or has labels or media."""
        return self.reads == "dialogue" and not self.labels and not self.media


def check_packing(config: DataConfig, spec: ModelSpec) -> None:
    """Makes sure that a model can read the rows of a data config where these hold several samples.

    Raises:
      ValueError: the model wants something of which a row has one.
    """
    if config.packing is None or spec.packs:
        return
    wanted = [field.name for field in (*spec.labels, *spec.media)]
    if wanted:
        rule = "a row has one of each, set packing=None"
        raise ValueError(f"packing with labels and media {wanted} of the model: {rule}")
    raise ValueError(f"packing with a model that reads {spec.reads!r}: a row is one text, set packing=None")


def open_sources(
    config: DataConfig, weights: Mapping[str, float] | None
) -> tuple[dict[str, Source], dict[str, float]]:
    """The sources of a training stream by name, opened, and their relative weights.

    Args:
      weights: by name; None or none takes all sources of the config alike.

    Raises:
      ValueError: a source is unknown or unreadable, or a weight is not above 0.
    """
    known = {s.name: s for s in config.sources}
    weights = dict(weights) if weights else dict.fromkeys(known, 1.0)
    if not weights or any(not w > 0 for w in weights.values()):
        raise ValueError(f"sources={weights}: needs at least one source, and weights above 0")
    for name in weights:
        if name not in known:
            raise ValueError(f"source {name!r}: not in the config; known: {', '.join(known)}")
    return {name: opened(config, known[name]) for name in weights}, weights


def opened(config: DataConfig, source: SourceConfig) -> Source:
    """A source of the config, read as the config says.

    Raises:
      ValueError: the source cannot be read at all; one line naming the file.
    """
    found = open_source(source, root=config.root, orientation=config.tiling.orientation)
    negatives = config.conversation.negatives
    return found if negatives is None else WithNegatives(found, negatives)


def find_source(config: DataConfig, name: str) -> SourceConfig:
    """The source config of that name, first among ``evaluation``, then among ``sources``.

    Raises:
      ValueError: there is none.
    """
    every = [*config.evaluation, *config.sources]
    for source in every:
        if source.name == name:
            return source
    raise ValueError(f"source {name!r}: not in the config; known: {', '.join(s.name for s in every)}")
