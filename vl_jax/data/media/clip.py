"""Clips: the frames of a moving picture as one array, and when each was taken.

    {"frames": "clips/jump" | ["f0.jpg", "f1.jpg", ...] | "jump.npy", "times": [0.0, 0.1, ...]}
        -->  media["clip"]() = u8[n h w c],  media["clip_times"]() = f32[n] seconds from the first frame

A folder means the pictures in it, by their names, in which numbers count as numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image as PilImage

from vl_jax.data.files.array_files import read_array
from vl_jax.data.images.clips import evenly, frames_in
from vl_jax.data.media.medium import Opened, RecordPlace, named
from vl_jax.data.sample import DEFAULT_MAX_PIXELS, BadSample, FileImage, Media, image_in

_ARRAYS = (".npy", ".npz")
_MOST = 100_000  # frames of a clip, before some of them are taken


@dataclass(frozen=True)
class ClipConfig:
    """A clip of a record."""

    name: str
    field: str = "frames"  # with a folder, a list of pictures, or an NPY file [n h w] or [n h w c]
    size: tuple[int, int] = (112, 112)  # height and width that frames are stretched to
    grey: bool = False  # one channel, else three
    most: int = 16  # frames that are taken of a clip
    rate: float = 0.0  # frames that are taken in a second; 0: ``most`` over the whole clip
    file_rate: float = 0.0  # frames a second of the files, where all have one
    times_field: str = ""  # of the record, with the seconds of all frames
    key: str = ""  # which array of an NPZ file; empty: the only one
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self):
        named(self.name, self.field)
        if min(self.size) < 1 or self.most < 1:
            raise ValueError(f"size={self.size}, most={self.most} of clip {self.name!r}: must be at least 1")
        if min(self.rate, self.file_rate) < 0:
            raise ValueError(
                f"rate={self.rate}, file_rate={self.file_rate} of clip {self.name!r}: must not be negative"
            )
        if self.rate and not self.file_rate and not self.times_field:
            raise ValueError(f"rate={self.rate} of clip {self.name!r} needs file_rate or times_field")

    @property
    def fields(self) -> tuple[str, ...]:
        """The field with the frames, and that with their times."""
        return (*named(self.name, self.field), *((self.times_field,) if self.times_field else ()))

    def open(self, record: Mapping[str, Any], place: RecordPlace) -> Opened:
        """The clip of a record, and its times where they are known."""
        held: Path | tuple[FileImage, ...] = self._held(record[self.fields[0]], place)
        times = self._times(record, place.where)
        if times is not None and isinstance(held, tuple) and len(times) != len(held):
            message = f"{place.where}: {len(times)} times of {len(held)} frames"
            raise BadSample("bad_times", message)
        clip = ClipFile(held, place.where, self, times)
        media: dict[str, Media] = {self.name: clip}
        if times is not None or self.file_rate:
            media[f"{self.name}_times"] = clip.seconds
        return Opened(media)

    def _held(self, value: Any, place: RecordPlace) -> Path | tuple[FileImage, ...]:
        field = self.fields[0]
        if isinstance(value, str) and value.endswith(_ARRAYS):
            return place.path(value, field, "clip")
        names = frames_in(value, place.folder, place.where) if isinstance(value, str) and value else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            message = f"{place.where}: {field} must be a folder, a list of paths, or an NPY file"
            raise BadSample("bad_clip_field", message)
        if not names:
            raise BadSample("no_frames", f"{place.where}: no frames in {field}={str(value)[:40]!r}")
        if len(names) > _MOST:
            raise BadSample("bad_clip_field", f"{place.where}: {len(names)} frames, limit {_MOST}")
        options = place.where, self.max_pixels, place.orientation
        return tuple(image_in(place.folder, name, *options) for name in names)

    def _times(self, record: Mapping[str, Any], where: str) -> tuple[float, ...] | None:
        """The seconds of all frames, as the record has them; None if it has none."""
        given = record.get(self.times_field) if self.times_field else None
        if given is None:
            if self.rate and not self.file_rate:
                raise BadSample("bad_times", f"{where}: {self.times_field} must say when frames were taken")
            return None
        numbers = isinstance(given, list) and all(type(t) in (int, float) for t in given)
        if not numbers or not np.all(np.isfinite(given)) or not np.all(np.diff(given) > 0):
            message = f"{where}: {self.times_field} must be a list of rising numbers of seconds"
            raise BadSample("bad_times", message)
        return tuple(given)


@dataclass(frozen=True)
class ClipFile:
    """A clip whose frames are read when it is asked for."""

    held: Path | tuple[FileImage, ...]
    where: str
    config: ClipConfig
    times: tuple[float, ...] | None  # seconds of all frames, if the record says

    def __call__(self) -> UInt8[np.ndarray, "n h w c"]:
        """The frames that are taken.

        Raises:
          BadSample: one is missing or cannot be read, or there is none.
        """
        if isinstance(self.held, Path):
            frames = self._array()
            taken = [PilImage.fromarray(frames[i]) for i in self._taken(len(frames))]
        else:
            taken = [self.held[i]() for i in self._taken(len(self.held))]
        mode, (height, width) = "L" if self.config.grey else "RGB", self.config.size
        shown = [frame.convert(mode).resize((width, height), PilImage.Resampling.BILINEAR) for frame in taken]
        found = np.stack([np.asarray(frame) for frame in shown])
        return found[..., None] if self.config.grey else found

    def seconds(self) -> Float[np.ndarray, " n"]:
        """When the frames that are taken were taken, from the first on; raises as a call."""
        count = len(self._array()) if isinstance(self.held, Path) else len(self.held)
        found = self._all_times(count)[self._taken(count)]
        return (found - found[0]).astype(np.float32)

    def _all_times(self, count: int) -> np.ndarray:
        if self.times is None:
            return np.arange(count) / (self.config.file_rate or 1.0)
        if len(self.times) != count:
            raise BadSample("bad_times", f"{self.where}: {len(self.times)} times of {count} frames")
        return np.array(self.times)

    def _taken(self, count: int) -> list[int]:
        """Which frames are taken: evenly over the clip, or those nearest to the times of the rate."""
        config = self.config
        if not config.rate:
            return evenly(count, config.most)
        times = self._all_times(count)
        wanted = times[0] + np.arange(config.most) / config.rate
        wanted = wanted[wanted <= times[-1] + 0.5 / config.rate]
        after = np.searchsorted(times, wanted).clip(1, max(count - 1, 1))
        if count == 1:
            return [0]
        nearer = wanted - times[after - 1] <= times[after] - wanted
        return (after - nearer).tolist()

    def _array(self) -> np.ndarray:
        assert isinstance(self.held, Path)
        found = read_array(self.held, self.where, kind="clip", key=self.config.key)
        if found.ndim == 4 and found.shape[-1] == 1:
            found = found[..., 0]
        if found.ndim not in (3, 4) or found.dtype != np.uint8 or (found.ndim == 4 and found.shape[-1] != 3):
            message = f"{self.where}: {self.held} is {found.dtype}{list(found.shape)}, not uint8 [n h w c]"
            raise BadSample("corrupt_clip", message)
        if not len(found):
            raise BadSample("no_frames", f"{self.where}: no frames in {self.held}")
        return found
