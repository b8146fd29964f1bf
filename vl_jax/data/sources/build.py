"""Opening data sources: every config becomes a random-access sequence of ``Sample`` records."""

from __future__ import annotations

import os
from typing import Any

from vl_jax.data.picture import Orientation
from vl_jax.data.sample import BadSample, Box, Image, Sample, Source, Turn
from vl_jax.data.sources.array_records import ArrayRecordConfig, ArrayRecordSource
from vl_jax.data.sources.coco import CocoConfig, CocoSource
from vl_jax.data.sources.label_studio import LabelStudioConfig, LabelStudioSource
from vl_jax.data.sources.llava import LlavaConfig, LlavaSource
from vl_jax.data.sources.meta import MetaConfig, MetaSource
from vl_jax.data.sources.parquet import ParquetConfig, ParquetSource
from vl_jax.data.sources.records import RecordsConfig, RecordsSource
from vl_jax.data.sources.scenes import ScenesConfig, ScenesSource
from vl_jax.data.sources.tfds import TfdsConfig, TfdsSource
from vl_jax.data.sources.webdataset import WebDatasetConfig, WebDatasetSource

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
    "RecordsConfig",
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
    | RecordsConfig
)


_FILES: dict[type, Any] = {
    LlavaConfig: LlavaSource,
    MetaConfig: MetaSource,
    CocoConfig: CocoSource,
    LabelStudioConfig: LabelStudioSource,
    WebDatasetConfig: WebDatasetSource,
    ParquetConfig: ParquetSource,
    TfdsConfig: TfdsSource,
    ArrayRecordConfig: ArrayRecordSource,
    RecordsConfig: RecordsSource,
}


def open_source(config: SourceConfig, *, root: str = ".", orientation: Orientation = "shown") -> Source:
    """Opens a source.

    Args:
      root: the folder that file names in the config are relative to.
      orientation: which way up its pictures are read, see ``TilingConfig``.

    Raises:
      ValueError: the source cannot be read at all; one line naming the file.
    """
    if isinstance(config, ScenesConfig):
        return ScenesSource(config)
    return _FILES[type(config)](config, root=root, orientation=orientation)


def stamp_of(source: Source) -> str:
    """Size and time of change of a source's files; empty for a source without any."""
    states = [os.stat(file) for file in getattr(source, "files", ())]
    return " ".join(f"{state.st_size}/{state.st_mtime_ns}" for state in states)
