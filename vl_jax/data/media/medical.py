"""Medical files: NIfTI by nibabel, DICOM by pydicom, both of which come with ``vl_jax[medical]``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from vl_jax.data.media.scan import Scan
from vl_jax.data.sample import BadSample

_MOST_SLICES = 5000
# DICOM counts to the left and to the back, an affine to the right and to the front.
_TO_RIGHT_AND_FRONT = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_nifti(file: Path, where: str) -> Scan:
    """The voxels of a file, scaled as it says; without an affine where its header has none.

    Raises:
      BadSample: there is no such file, no package that reads it, or it is no NIfTI.
    """
    if not file.is_file():
        raise BadSample("missing_volume", f"{where}: no file {file}")
    nibabel = _package("nibabel", file, where)
    try:
        image = nibabel.load(file)
        header = image.header
        placed = int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0
        return Scan(np.asarray(image.dataobj, np.float32), np.array(image.affine) if placed else None)
    except Exception as error:  # Hostile files raise almost anything.
        raise _corrupt(file, where, error) from None


def read_dicom(place: Path, where: str) -> Scan:
    """The slices in a folder, or the one in a file, in the order in which they lie in the body.

    Raises:
      BadSample: there is none, no package that reads them, or they are no slices of one series.
    """
    files = sorted(f for f in place.iterdir() if f.is_file()) if place.is_dir() else [place]
    if not files or not files[0].is_file():
        raise BadSample("missing_volume", f"{where}: no slices in {place}")
    if len(files) > _MOST_SLICES:
        raise BadSample("corrupt_volume", f"{where}: {len(files)} slices in {place}, limit {_MOST_SLICES}")
    pydicom = _package("pydicom", place, where)
    try:
        slices = [pydicom.dcmread(file) for file in files]
        if len({str(s.get("SeriesInstanceUID", "")) for s in slices}) > 1:
            raise ValueError("slices of several series")
        geometry = [_geometry(s) for s in slices]
        if any(g is None for g in geometry):
            return Scan(np.stack([_values(s).T for s in slices], axis=-1), None)
        return _stacked(slices, [g for g in geometry if g is not None])
    except Exception as error:  # Hostile files raise almost anything.
        raise _corrupt(place, where, error) from None


def _geometry(dataset: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Where a slice begins, where its columns and rows lead, in millimetres; None if it does not say."""
    found = [dataset.get(n) for n in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")]
    if any(value is None for value in found):
        return None
    position, directions, spacing = (np.array(value, np.float64) for value in found)
    # Columns of pixels follow one another along the first direction, rows along the second.
    return position, directions[:3] * spacing[1], directions[3:] * spacing[0]


def _stacked(slices: list[Any], geometry: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Scan:
    _, across, down = geometry[0]
    if any(not np.allclose(g[1:], geometry[0][1:], atol=1e-3) for g in geometry):
        raise ValueError("slices that are not parallel")
    normal = np.cross(across, down) / np.linalg.norm(np.cross(across, down))
    heights = np.array([position @ normal for position, _, _ in geometry])
    order = np.argsort(heights)
    gaps = np.diff(heights[order])
    if len(gaps) and (gaps.min() <= 0 or gaps.max() > 1.1 * gaps.min()):
        raise ValueError(f"slices {gaps.min():g} to {gaps.max():g} mm apart: one is missing or comes twice")
    thickness = float(gaps.mean()) if len(gaps) else float(slices[0].get("SliceThickness") or 1)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = across, down, normal * thickness
    affine[:3, 3] = geometry[int(order[0])][0]
    values = np.stack([_values(slices[int(i)]).T for i in order], axis=-1)
    return Scan(values, _TO_RIGHT_AND_FRONT @ affine)


def _values(dataset: Any) -> np.ndarray:
    """The pixels of a slice in the units that it says, such as Hounsfield's."""
    slope, intercept = (float(dataset.get(n, d)) for n, d in (("RescaleSlope", 1), ("RescaleIntercept", 0)))
    return dataset.pixel_array.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _package(name: str, file: Path, where: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        message = f"{where}: {file} needs {name}: pip install 'vl_jax[medical]'"
        raise BadSample("missing_package", message) from None


def _corrupt(file: Path, where: str, error: Exception) -> BadSample:
    return BadSample("corrupt_volume", f"{where}: cannot read {file}: {error or type(error).__name__}")
