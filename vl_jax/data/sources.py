"""Opening data sources: every config becomes a random-access sequence of ``Sample`` records."""

from __future__ import annotations

import os
from typing import Any, Protocol, runtime_checkable

from vl_jax.data.array_records import ArrayRecordConfig, ArrayRecordSource
from vl_jax.data.coco import CocoConfig, CocoSource
from vl_jax.data.label_studio import LabelStudioConfig, LabelStudioSource
from vl_jax.data.llava import LlavaConfig, LlavaSource
from vl_jax.data.meta import MetaConfig, MetaSource
from vl_jax.data.parquet import ParquetConfig, ParquetSource
from vl_jax.data.sample import BadSample, Box, Image, Sample, Turn
from vl_jax.data.scenes import ScenesConfig, ScenesSource
from vl_jax.data.tfds import TfdsConfig, TfdsSource
from vl_jax.data.webdataset import WebDatasetConfig, WebDatasetSource

__all__ = [
    "ArrayRecordConfig",
    "BadSample",
    "Box",
    "CocoConfig",
    "Image",
    "LabelStudioConfig",
    "LlavaConfig",
    "MetaConfig",
    "ParquetConfig",
    "Sample",
    "ScenesConfig",
    "Source",
    "SourceConfig",
    "TfdsConfig",
    "Turn",
    "WebDatasetConfig",
    "open_source",
    "stamp_of",
]

SourceConfig = (
    ScenesConfig
    | LlavaConfig
    | MetaConfig
    | CocoConfig
    | LabelStudioConfig
    | WebDatasetConfig
    | ParquetConfig
    | TfdsConfig
    | ArrayRecordConfig
)


@runtime_checkable
class Source(Protocol):
    """Random access to samples; reading a bad record raises ``BadSample``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


_FILES: dict[type, Any] = {
    LlavaConfig: LlavaSource,
    MetaConfig: MetaSource,
    CocoConfig: CocoSource,
    LabelStudioConfig: LabelStudioSource,
    WebDatasetConfig: WebDatasetSource,
    ParquetConfig: ParquetSource,
    TfdsConfig: TfdsSource,
    ArrayRecordConfig: ArrayRecordSource,
}


def open_source(config: SourceConfig, *, root: str = ".") -> Source:
    """Opens a source; ``root`` is the folder that file names in the config are relative to.

    Raises:
      ValueError: the source cannot be read at all; one line naming the file.
    """
    if isinstance(config, ScenesConfig):
        return ScenesSource(config)
    return _FILES[type(config)](config, root=root)


def stamp_of(source: Source) -> str:
    """Size and time of change of a source's files; empty for a source without any."""
    states = [os.stat(file) for file in getattr(source, "files", ())]
    return " ".join(f"{state.st_size}/{state.st_mtime_ns}" for state in states)
