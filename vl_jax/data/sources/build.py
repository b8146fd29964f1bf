"""Opening data sources: every config becomes a random-access sequence of ``Sample`` records."""

from __future__ import annotations

import dataclasses
import os
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

from vl_jax.data.picture import Orientation
from vl_jax.data.sample import BadSample, Box, Image, Sample, Source, Turn
from vl_jax.data.sources.array_records import ArrayRecordConfig
from vl_jax.data.sources.coco import CocoConfig
from vl_jax.data.sources.exams.questions import ExamConfig
from vl_jax.data.sources.filters.best_pairs import BestPairs
from vl_jax.data.sources.filters.matched import Matched, SameKind
from vl_jax.data.sources.filters.written import Wording, Written
from vl_jax.data.sources.in_domain import InDomain
from vl_jax.data.sources.label_studio.source import LabelStudioConfig
from vl_jax.data.sources.llava import LlavaConfig
from vl_jax.data.sources.meta import MetaConfig
from vl_jax.data.sources.parquet import ParquetConfig
from vl_jax.data.sources.placed import PlacedConfig
from vl_jax.data.sources.recorded.arrays import RecordedArraysConfig
from vl_jax.data.sources.recorded.walks import RecordedWalksConfig
from vl_jax.data.sources.recorded.windows import RecordedWindowsConfig
from vl_jax.data.sources.records import RecordsConfig
from vl_jax.data.sources.scenes import ScenesConfig, SceneTextsConfig
from vl_jax.data.sources.synthesis.boards import SyntheticBoardsConfig
from vl_jax.data.sources.synthesis.scenes import SyntheticScenesConfig
from vl_jax.data.sources.tfds import TfdsConfig
from vl_jax.data.sources.webdataset import WebDatasetConfig
from vl_jax.runtime.storage import buckets
from vl_jax.schema import Open

__all__ = [
    "ArrayRecordConfig",
    "BadSample",
    "BestPairsConfig",
    "Box",
    "CocoConfig",
    "ExamConfig",
    "Image",
    "InDomainConfig",
    "LabelStudioConfig",
    "LlavaConfig",
    "MatchedConfig",
    "MetaConfig",
    "ParquetConfig",
    "PlacedConfig",
    "RecordedArraysConfig",
    "RecordedWalksConfig",
    "RecordedWindowsConfig",
    "RecordsConfig",
    "Sample",
    "SceneTextsConfig",
    "ScenesConfig",
    "Source",
    "SourceConfig",
    "SyntheticBoardsConfig",
    "SyntheticScenesConfig",
    "TfdsConfig",
    "Turn",
    "WebDatasetConfig",
    "WrittenConfig",
    "open_source",
    "stamp_of",
]


@runtime_checkable
class OwnSourceConfig(Protocol):
    """The config of a source in a file of one's own, a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """Of the source, for stages and messages."""
        ...

    def open(self, root: str, *, orientation: Orientation = "shown") -> Source:
        """The source.

        Args:
          root: the folder that file names in the config are relative to.
          orientation: which way up its pictures are read, see ``TilingConfig``.

        Raises:
          ValueError: the source cannot be read at all; one line naming the file.
        """
        ...


_Known = (
    ScenesConfig
    | SceneTextsConfig
    | SyntheticScenesConfig
    | SyntheticBoardsConfig
    | LlavaConfig
    | MetaConfig
    | CocoConfig
    | LabelStudioConfig
    | WebDatasetConfig
    | ParquetConfig
    | TfdsConfig
    | ArrayRecordConfig
    | RecordsConfig
    | PlacedConfig
    | ExamConfig
    | RecordedArraysConfig
    | RecordedWalksConfig
    | RecordedWindowsConfig
)
_OWN = Open("source", ("name", "open"))


@dataclasses.dataclass(frozen=True)
class InDomainConfig:
    """A source all of whose samples are of one field of application, which is among their labels."""

    name: str
    domain: str
    source: Annotated[_Known | OwnSourceConfig, _OWN]

    def __post_init__(self):
        if not self.domain:
            raise ValueError(f"domain of source {self.name!r} is empty; it must have a name")

    def open(self, root: str, *, orientation: Orientation = "shown") -> InDomain:
        """The source; raises as the one in it."""
        return InDomain(self.source.open(root, orientation=orientation), self.domain)


@dataclasses.dataclass(frozen=True)
class BestPairsConfig:
    """A source without the share of its pairs that a trained model finds least alike."""

    name: str
    source: Annotated[_Known | OwnSourceConfig, _OWN]
    scores: str  # file with an id and a similarity a line, relative to the root of the data
    drop: float = 0.2  # the share

    def __post_init__(self):
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop={self.drop} of source {self.name!r}: must be in [0, 1)")

    def open(self, root: str, *, orientation: Orientation = "shown") -> BestPairs:
        """The source.

        Raises:
          ValueError: it cannot be read, or its scores cannot; one line naming the file.
        """
        scores = buckets.file_in(root, self.scores)
        return BestPairs(self.source.open(root, orientation=orientation), scores, self.drop)


@dataclasses.dataclass(frozen=True)
class MatchedConfig:
    """Samples of two sources side by side, of one kind at a stated rate; see ``filters.matched``."""

    name: str
    first: Annotated[_Known | OwnSourceConfig, _OWN]
    second: Annotated[_Known | OwnSourceConfig, _OWN]
    labels: tuple[str, str]  # of the first and the second source, which say of which kind a sample is
    kinds: tuple[SameKind, ...]  # labels of both that mean the same
    agreement: float = 1.0  # how often the two are of one kind
    partners: int = 1  # how often a sample of the first comes, each time with another partner
    seed: int = 0  # who is whose partner

    def __post_init__(self):
        if not 0 <= self.agreement <= 1 or not self.kinds or self.partners < 1:
            raise ValueError(
                f"agreement={self.agreement}, {len(self.kinds)} kinds, partners={self.partners} of source "
                f"{self.name!r}: must be in [0, 1], and at least one kind and one partner"
            )
        for side in ("first", "second"):
            values = [value for kind in self.kinds for value in getattr(kind, side)]
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"kinds of source {self.name!r}: {side} {twice!r} is of two kinds")

    def open(self, root: str, *, orientation: Orientation = "shown") -> Matched:
        """The source; raises as the two in it do, and where one kind has no partner."""
        opened = (source.open(root, orientation=orientation) for source in (self.first, self.second))
        options = {"agreement": self.agreement, "partners": self.partners, "seed": self.seed}
        return Matched(*opened, labels=self.labels, kinds=self.kinds, **options)


@dataclasses.dataclass(frozen=True)
class WrittenConfig:
    """A source with texts written for its samples, which fit at a stated rate; see ``filters.written``."""

    name: str
    source: Annotated[_Known | OwnSourceConfig, _OWN]
    label: str  # by which a text fits
    wordings: tuple[Wording, ...]
    agreement: float = 1.0  # how often it does
    seed: int = 0  # which text a sample has

    def __post_init__(self):
        labels = [wording.label for wording in self.wordings]
        if not 0 <= self.agreement <= 1 or len(set(labels)) < max(len(labels), 2):
            raise ValueError(
                f"agreement={self.agreement}, wordings of {labels} of source {self.name!r}: must be in "
                "[0, 1], and of two labels at least, all different"
            )
        if not all(wording.texts for wording in self.wordings):
            raise ValueError(f"wordings of source {self.name!r}: every label needs a text")

    def open(self, root: str, *, orientation: Orientation = "shown") -> Written:
        """The source; raises as the one in it."""
        options = {"agreement": self.agreement, "seed": self.seed}
        source = self.source.open(root, orientation=orientation)
        return Written(source, label=self.label, wordings=self.wordings, **options)


_Around = InDomainConfig | BestPairsConfig | MatchedConfig | WrittenConfig
SourceConfig = Annotated[_Known | _Around | OwnSourceConfig, _OWN]


def open_source(config: SourceConfig, *, root: str = ".", orientation: Orientation = "shown") -> Source:
    """Opens a source.

    Args:
      root: the folder that file names in the config are relative to.
      orientation: which way up its pictures are read, see ``TilingConfig``.

    Raises:
      ValueError: the source cannot be read at all; one line naming the file.
    """
    return config.open(root, orientation=orientation)


def stamp_of(source: Source) -> str:
    """Size and time of change of a source's files; empty for a source without any."""
    states = [os.stat(file) for file in getattr(source, "files", ())]
    return " ".join(f"{state.st_size}/{state.st_mtime_ns}" for state in states)
