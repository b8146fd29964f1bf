"""Volumes: scans of a body in three dimensions, turned one way, at one spacing, in one range.

    {"scan": "ct.nii.gz" | "slices/" | "scan.npz", "label": 1}   -->   media["scan"]() = f32[x y z 1]

    axes as stored --affine--> x from left to right, y from back to front, z from foot to head --spacing-->
        voxels of equal size --window--> 0..1 --shape--> cut or filled on all sides alike

NIfTI and DICOM are read by packages of their own (``medical``). An NPZ file holds ``volume`` and ``affine``,
the 4x4 matrix that takes indices to millimetres, x growing to the right, y to the front, z to the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from vl_jax.data.files.array_files import arrays_in, read_array
from vl_jax.data.media import medical
from vl_jax.data.media.medium import Opened, RecordPlace, named
from vl_jax.data.media.scan import Scan, canonical, resized, spacing_of
from vl_jax.data.sample import BadSample

_NIFTI = (".nii", ".nii.gz")


@dataclass(frozen=True)
class VolumeConfig:
    """A volume of a record."""

    name: str
    field: str = ""  # of the record, with the path of a file, or of a folder of DICOM slices
    spacing: tuple[float, float, float] | None = None  # millimetres of a voxel; None: it stays as it is
    # Centre and width of the values that become 0 to 1, what is beyond is cut off; None: no change. In
    # Hounsfield units a lung is seen at (-600, 1500), soft tissue at (40, 400).
    window: tuple[float, float] | None = None
    shape: tuple[int, int, int] | None = None  # voxels; None: as many as there are
    key: str = "volume"  # of an NPZ file
    affine: Literal["needed", "ignored"] = "needed"  # ignored: axes and spacing stay as they are stored

    def __post_init__(self):
        named(self.name, self.field)
        if self.spacing is not None and not min(self.spacing) > 0:
            raise ValueError(f"spacing={self.spacing} of volume {self.name!r}: must be above 0 mm")
        if self.spacing is not None and self.affine == "ignored":
            raise ValueError(f"spacing of volume {self.name!r} needs affine='needed'")
        if self.window is not None and not self.window[1] > 0:
            raise ValueError(f"window={self.window} of volume {self.name!r}: its width must be above 0")
        if self.shape is not None and min(self.shape) < 1:
            raise ValueError(f"shape={self.shape} of volume {self.name!r}: must be at least 1")

    @property
    def fields(self) -> tuple[str, ...]:
        """The field with the path."""
        return named(self.name, self.field)

    def open(self, record: Mapping[str, Any], place: RecordPlace) -> Opened:
        """The volume of a record."""
        (field,) = self.fields
        return Opened({self.name: VolumeFile(place.path(record[field], field, "volume"), place.where, self)})


@dataclass(frozen=True)
class VolumeFile:
    """A volume that is read when it is asked for."""

    path: Path
    where: str
    config: VolumeConfig

    def __call__(self) -> Float[np.ndarray, "x y z 1"]:
        """The volume as the config wants it.

        Raises:
          BadSample: the file is missing or cannot be read, it has no affine, or voxels that are no numbers.
        """
        config, scan = self.config, self._scan()
        if scan.values.ndim != 3 or not scan.values.size:
            message = f"{self.where}: {self.path} of shape {scan.values.shape}, expected three axes"
            raise BadSample("corrupt_volume", message)
        values = scan.values.astype(np.float32)
        if not np.isfinite(values).all():
            raise BadSample("not_finite", f"{self.where}: {self.path} has voxels that are no finite numbers")
        if config.affine == "needed":
            values, affine = canonical(self._placed(scan)._replace(values=values))
            if config.spacing is not None:
                values = resized(values, spacing_of(affine), config.spacing)
        return fitted(windowed(values, config.window), config.shape)[..., None]

    def _scan(self) -> Scan:
        name = self.path.name.lower()
        if name.endswith(_NIFTI):
            return medical.read_nifti(self.path, self.where)
        if self.path.is_dir() or name.endswith(".dcm"):
            return medical.read_dicom(self.path, self.where)
        key = self.config.key if name.endswith(".npz") else ""
        values, affine = read_array(self.path, self.where, kind="volume", key=key), None
        if name.endswith(".npz") and "affine" in arrays_in(self.path):
            affine = read_array(self.path, self.where, kind="volume", key="affine").astype(np.float64)
        return Scan(values, affine)

    def _placed(self, scan: Scan) -> Scan:
        """The scan, whose affine is there and can be inverted."""
        affine = scan.affine
        if affine is None:
            rule = "nothing says which way it lies; affine='ignored' takes it as it is stored"
            raise BadSample("no_affine", f"{self.where}: {self.path} has no affine: {rule}")
        usable = affine.shape == (4, 4) and np.isfinite(affine).all() and abs(np.linalg.det(affine)) > 1e-9
        if not usable:
            raise BadSample("no_affine", f"{self.where}: {self.path} has an affine that leads nowhere")
        return scan


def windowed(
    values: Float[np.ndarray, "x y z"], window: tuple[float, float] | None
) -> Float[np.ndarray, "x y z"]:
    """Values of which the ends of the window are 0 and 1."""
    if window is None:
        return values
    centre, width = window
    return ((values - (centre - width / 2)) / width).clip(0, 1).astype(np.float32)


def fitted(values: Float[np.ndarray, "x y z"], shape: tuple[int, int, int] | None) -> np.ndarray:
    """The middle of the volume in that shape; around one that is smaller stands its least value."""
    if shape is None:
        return values
    result = np.full(shape, values.min(), values.dtype)
    source, target = [], []
    for have, want in zip(values.shape, shape, strict=True):
        both = min(have, want)
        source.append(slice((have - both) // 2, (have - both) // 2 + both))
        target.append(slice((want - both) // 2, (want - both) // 2 + both))
    result[tuple(target)] = values[tuple(source)]
    return result
