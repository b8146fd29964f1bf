"""Scans: voxels, and the matrix that says where each lies in the body."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Scan(NamedTuple):
    """Voxels and their place."""

    values: np.ndarray  # [i j k] as they are stored
    affine: Float[np.ndarray, "4 4"] | None  # indices to millimetres to the right, to the front, to the head


def canonical(scan: Scan) -> tuple[np.ndarray, Float[np.ndarray, "4 4"]]:
    """The voxels with axes that grow to the right, to the front and to the head, and their affine.

    Axes are exchanged and turned round, no voxel is computed anew: an oblique scan stays oblique.
    """
    values, affine = scan.values, np.array(scan.affine, np.float64)
    order = _axes(affine[:3, :3])
    values, affine = values.transpose(order), affine[:, [*order, 3]]
    for axis in range(3):
        if affine[axis, axis] < 0:
            values = np.flip(values, axis)
            affine[:3, 3] += affine[:3, axis] * (values.shape[axis] - 1)
            affine[:, axis] *= -1
    return np.ascontiguousarray(values), affine


def _axes(directions: Float[np.ndarray, "3 3"]) -> list[int]:
    """Which axis of the voxels goes most along each of the body's, the clearest first."""
    shares = np.abs(directions / np.linalg.norm(directions, axis=0))
    found = [-1, -1, -1]
    for _ in range(3):
        body, stored = np.unravel_index(np.argmax(shares), shares.shape)
        found[int(body)] = int(stored)
        shares[body, :] = shares[:, stored] = -1
    return found


def spacing_of(affine: Float[np.ndarray, "4 4"]) -> tuple[float, float, float]:
    """Millimetres from a voxel to the next along each axis."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return x, y, z


def resized(
    values: Float[np.ndarray, "x y z"], spacing: tuple[float, ...], wanted: tuple[float, ...]
) -> Float[np.ndarray, "u v w"]:
    """The volume with voxels of another size: smoothed where these are larger, then read on lines."""
    factors = [have / want for have, want in zip(spacing, wanted, strict=True)]
    if all(abs(factor - 1) < 1e-3 for factor in factors):
        return values
    from scipy import ndimage  # takes a while to import, and may not be needed

    # Half the step from one new voxel to the next, less half of an old one.
    blur = [max(0.0, (1 / factor - 1) / 2) for factor in factors]
    smooth = ndimage.gaussian_filter(values, blur, mode="nearest") if any(blur) else values
    found = ndimage.zoom(smooth, factors, order=1, mode="nearest", grid_mode=True)
    return np.asarray(found, np.float32)
