"""Maps as inputs of their own: how far away each pixel is, and where it moves.

    {"depth": "a.png" | "a.npy"}   -->   media["depth"]() = f32[h w 1] metres, 0 where nothing was measured
    {"flow": "a.flo" | "a.npy"}    -->   media["flow"]() = f32[h w 2] pixels to the right and down

A FLO file (Middlebury) is the number 202021.25, the width and the height as int32, then two float32 a pixel.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from vl_jax.data.files.array_files import read_array
from vl_jax.data.media.medium import Opened, RecordPlace, named
from vl_jax.data.sample import DEFAULT_MAX_PIXELS, BadSample, FileImage

_ARRAYS = (".npy", ".npz")
_FLO = 202021.25


@dataclass(frozen=True)
class DepthMapConfig:
    """Depth of a record, from a picture of whole numbers, or from an array of metres."""

    name: str
    field: str = ""  # of the record, with the path; empty: that of the name
    size: tuple[int, int] = (224, 224)  # height and width; the nearest pixel is taken, depth is never mixed
    levels: float = 1000.0  # of a picture, to a metre
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self):
        named(self.name, self.field)
        if min(self.size) < 1 or not self.levels > 0:
            raise ValueError(f"size={self.size}, levels={self.levels} of {self.name!r}: must be above 0")

    @property
    def fields(self) -> tuple[str, ...]:
        """The field with the path."""
        return named(self.name, self.field)

    def open(self, record: Mapping[str, Any], place: RecordPlace) -> Opened:
        """The depth of a record."""
        (field,) = self.fields
        return Opened({self.name: DepthFile(place.path(record[field], field, "depth"), place.where, self)})


@dataclass(frozen=True)
class DepthFile:
    """Depth that is read when it is asked for."""

    path: Path
    where: str
    config: DepthMapConfig

    def __call__(self) -> Float[np.ndarray, "h w 1"]:
        """Metres.

        Raises:
          BadSample: the file is missing or cannot be read, or it has no number for each pixel.
        """
        if self.path.suffix in _ARRAYS:
            found = read_array(self.path, self.where, kind="depth")
        else:
            image = FileImage(self.path, self.where, self.config.max_pixels)
            found = image.opened(np.asarray) / self.config.levels
        if found.ndim != 2 or not found.size:
            message = f"{self.where}: {self.path} of shape {found.shape}, expected one number for a pixel"
            raise BadSample("corrupt_depth", message)
        return np.nan_to_num(nearest(found, self.config.size), posinf=0.0).astype(np.float32)[..., None]


@dataclass(frozen=True)
class FlowMapConfig:
    """Optical flow of a record."""

    name: str
    field: str = ""  # of the record, with the path; empty: that of the name
    size: tuple[int, int] = (224, 224)  # height and width; motions are scaled with the picture

    def __post_init__(self):
        named(self.name, self.field)
        if min(self.size) < 1:
            raise ValueError(f"size={self.size} of {self.name!r}: must be at least 1")

    @property
    def fields(self) -> tuple[str, ...]:
        """The field with the path."""
        return named(self.name, self.field)

    def open(self, record: Mapping[str, Any], place: RecordPlace) -> Opened:
        """The flow of a record."""
        (field,) = self.fields
        return Opened({self.name: FlowFile(place.path(record[field], field, "flow"), place.where, self)})


@dataclass(frozen=True)
class FlowFile:
    """Flow that is read when it is asked for."""

    path: Path
    where: str
    config: FlowMapConfig

    def __call__(self) -> Float[np.ndarray, "h w 2"]:
        """Pixels to the right and down.

        Raises:
          BadSample: the file is missing or cannot be read, or it has no two numbers for each pixel.
        """
        arrays = self.path.suffix in _ARRAYS
        found = read_array(self.path, self.where, kind="flow") if arrays else self._flo()
        if found.ndim != 3 or found.shape[-1] != 2 or not found.size:
            message = f"{self.where}: {self.path} of shape {found.shape}, expected [h w 2]"
            raise BadSample("corrupt_flow", message)
        if not np.isfinite(found).all():
            raise BadSample("not_finite", f"{self.where}: {self.path} has motions that are no finite numbers")
        (height, width), (rows, columns) = self.config.size, found.shape[:2]
        scale = np.array([width / columns, height / rows], np.float32)
        return nearest(found.astype(np.float32), self.config.size) * scale

    def _flo(self) -> np.ndarray:
        if not os.path.isfile(self.path):
            raise BadSample("missing_flow", f"{self.where}: no file {self.path}")
        data = self.path.read_bytes()
        mark, width, height = struct.unpack_from("<fii", data) if len(data) >= 12 else (0.0, 0, 0)
        if mark != _FLO or min(width, height) < 1 or len(data) != 12 + 8 * width * height:
            raise BadSample("corrupt_flow", f"{self.where}: {self.path} is no FLO file")
        return np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2)


def nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map stretched to a size, each new pixel the one below its centre."""
    rows, columns = (
        ((np.arange(want) + 0.5) * have / want).astype(int)
        for want, have in zip(size, values.shape[:2], strict=True)
    )
    return values[rows[:, None], columns]
