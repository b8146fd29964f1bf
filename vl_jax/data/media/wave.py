"""Sounds as waves: the samples of a sound file at one rate, all channels as one.

{"id": "7", "audio": "7.flac", "label": "angry"}   -->   Sample.media["wave"]() = f32[n], full scale at 1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from vl_jax.data.files.sound_files import Header, read_header, read_sound
from vl_jax.data.images.audio import resample
from vl_jax.data.media.medium import Opened, RecordPlace, named
from vl_jax.data.sample import BadSample, Note


@dataclass(frozen=True)
class WaveConfig:
    """A sound of a record as a wave."""

    name: str
    field: str = ""  # of the record, with the path of a sound file; empty: that of the name
    rate: int = 16_000  # samples a second that every sound is brought to
    resample: bool = True  # sounds at another rate are brought to it, which is noted; else they are refused
    max_seconds: float = 60.0  # longer sounds are refused

    def __post_init__(self):
        named(self.name, self.field)
        if not 1000 <= self.rate <= 192_000:
            raise ValueError(f"rate={self.rate} of wave {self.name!r}: must lie in 1000..192000 Hz")
        if not self.max_seconds > 0:
            raise ValueError(f"max_seconds={self.max_seconds} of wave {self.name!r}: must be above 0")

    @property
    def fields(self) -> tuple[str, ...]:
        """The field with the path."""
        return named(self.name, self.field)

    def open(self, record: Mapping[str, Any], place: RecordPlace) -> Opened:
        """The wave of a record; its header is read, so that a rate can be refused or noted."""
        (field,) = self.fields
        file = WaveFile(place.path(record[field], field, "audio"), place.where, self)
        rate = file.header().rate
        notes = ()
        if rate != self.rate:
            told = f"{place.where}: {file.path.name} at {rate} Hz"
            if not self.resample:
                raise BadSample("wrong_rate", f"{told}, must be {self.rate} Hz: set resample=True")
            notes = (Note("resampled", f"{told} is brought to {self.rate} Hz"),)
        return Opened({self.name: file}, notes)


@dataclass(frozen=True)
class WaveFile:
    """A sound file as a wave; its header is checked before any sample is read."""

    path: Path
    where: str
    config: WaveConfig

    def __call__(self) -> Float[np.ndarray, " n"]:
        """The samples at the rate of the config, the mean of all channels.

        Raises:
          BadSample: the file is missing, empty, too long, cut off, or no sound that can be read here.
        """
        self.header()
        samples, rate = read_sound(self.path, self.where)
        return resample(samples.mean(1, dtype=np.float32), rate, self.config.rate)

    def header(self) -> Header:
        """What the file says of itself; raises as a call."""
        found = read_header(self.path, self.where)
        if not found.length:
            raise BadSample("empty_audio", f"{self.where}: no sound in {self.path}")
        if found.seconds > self.config.max_seconds:
            limit = f"limit {self.config.max_seconds:g}"
            message = f"{self.where}: {self.path} has {found.seconds:,.1f} seconds, {limit}"
            raise BadSample("audio_too_long", message)
        return found
