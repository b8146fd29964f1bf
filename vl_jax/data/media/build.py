"""Media of records by config: which fields name them, and how they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from vl_jax.data.media.clip import ClipConfig
from vl_jax.data.media.maps import DepthMapConfig, FlowMapConfig
from vl_jax.data.media.medium import MediumConfig, Opened, RecordPlace
from vl_jax.data.media.series import SeriesConfig
from vl_jax.data.media.volume import VolumeConfig
from vl_jax.data.media.wave import WaveConfig
from vl_jax.schema import Open

AnyMedium = Annotated[
    WaveConfig | SeriesConfig | ClipConfig | VolumeConfig | DepthMapConfig | FlowMapConfig | MediumConfig,
    Open("medium", ("name", "fields", "open")),
]


def check_media(media: Sequence[AnyMedium], source: str) -> None:
    """The rules for all media of a source.

    Raises:
      ValueError: two have one name.
    """
    names = [medium.name for medium in media]
    if len(set(names)) < len(names):
        raise ValueError(f"media of source {source!r}: names {names}, must be different")


def open_media(media: Sequence[AnyMedium], record: Mapping[str, Any], place: RecordPlace) -> Opened:
    """All media that a record has: those whose first field is neither null nor empty.

    Raises:
      BadSample: the record says of one what cannot be.
    """
    opened = [m.open(record, place) for m in media if record.get(m.fields[0]) not in (None, "")]
    found = {name: medium for one in opened for name, medium in one.media.items()}
    return Opened(found, tuple(note for one in opened for note in one.notes))
