"""Opening data sources: every config becomes a random-access sequence of ``Sample`` records."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from vl_jax.data.llava import LlavaConfig, LlavaSource
from vl_jax.data.sample import BadSample, Box, Image, Sample, Turn
from vl_jax.data.scenes import ScenesConfig, ScenesSource

__all__ = [
    "BadSample",
    "Box",
    "Image",
    "LlavaConfig",
    "Sample",
    "ScenesConfig",
    "Source",
    "SourceConfig",
    "Turn",
    "open_source",
]

SourceConfig = ScenesConfig | LlavaConfig


@runtime_checkable
class Source(Protocol):
    """Random access to samples; reading a bad record raises ``BadSample``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def open_source(config: SourceConfig, *, root: str = ".") -> Source:
    """Opens a source; ``root`` is the folder that file names in the config are relative to.

    Raises:
      ValueError: the source cannot be read at all; one line naming the file.
    """
    if isinstance(config, ScenesConfig):
        return ScenesSource(config)
    return LlavaSource(config, root=root)
