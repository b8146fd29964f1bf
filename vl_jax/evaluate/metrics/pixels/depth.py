"""Errors of depth: how far each pixel is said to be, against how far it is.

    abs_rel = mean |d - d'| / d      sq_rel = mean (d - d')² / d       rmse = sqrt mean (d - d')²
    log10 = mean |log10 d - log10 d'|      delta_k = share with max(d / d', d' / d) < 1.25^k

Figures are comparable only if the same pixels count and predictions were fitted alike. So both are part
of the names: ``abs_rel_median_cap10`` counts pixels up to 10 m and multiplies each prediction by one
number first. Caps are 10 m for NYU and 80 m for KITTI as a rule; crops, such as Eigen's, are given as
masks. Figures are those of each picture, averaged; ``pooled`` takes all pixels of the set together.
Source: Eigen et al., "Depth Map Prediction from a Single Image", 2014; Ranftl et al., "MiDaS", 2020, for
the fit of scale and shift (there of disparity, here of what is given).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from vl_jax.evaluate.metrics.per_sample import PerSample, SampleList

Alignment = Literal["none", "median", "least_squares"]
_ERRORS = ("abs_rel", "sq_rel", "mse", "log10", "delta_1", "delta_2", "delta_3")


def depth_errors(truth: Float[np.ndarray, " N"], said: Float[np.ndarray, " N"]) -> dict[str, float]:
    """The sums over pixels of every error; all depths are positive and finite. ``mse`` is squared."""
    apart, ratio = np.abs(truth - said), np.maximum(truth / said, said / truth)
    sums = {
        "abs_rel": apart / truth,
        "sq_rel": apart**2 / truth,
        "mse": apart**2,
        "log10": np.abs(np.log10(truth) - np.log10(said)),
        **{f"delta_{k}": ratio < 1.25**k for k in (1, 2, 3)},
    }
    return {name: float(values.sum()) for name, values in sums.items()}


class DepthScores:
    """The errors over all pictures.

    Args:
      cap: the largest true depth that counts; predictions are cut there too. None: no limit.
      floor: the smallest true depth that counts, above 0; predictions are cut there too.
      alignment: what is done to each prediction first: nothing, its median made that of the truth, or
        scale and shift fitted to the truth by least squares.
      pooled: all pixels of the set are averaged together, not picture by picture.

    Raises:
      ValueError: the limits are not in order.
    """

    def __init__(
        self,
        *,
        cap: float | None = None,
        floor: float = 1e-3,
        alignment: Alignment = "none",
        pooled: bool = False,
    ):
        if floor <= 0 or (cap is not None and cap <= floor):
            raise ValueError(f"floor={floor}, cap={cap}: expected 0 < floor < cap")
        self._floor, self._cap, self._pooled = floor, cap, pooled
        self._alignment: Alignment = alignment
        parts = (
            alignment if alignment != "none" else "",
            f"cap{cap:g}" if cap is not None else "",
            "pooled" if pooled else "",
        )
        self._suffix = "".join(f"_{part}" for part in parts if part)
        self._found = SampleList([f"{name}{self._suffix}" for name in (*_ERRORS, "rmse")])

    @property
    def suffix(self) -> str:
        """What stands behind the name of every score: how predictions are fitted, and what counts."""
        return self._suffix

    def update(
        self,
        truth: Float[np.ndarray, "H W"],
        prediction: Float[np.ndarray, "h w"],
        *,
        valid: Bool[np.ndarray, "y x"] | None = None,
        cluster: str | None = None,
    ) -> None:
        """Takes one picture; all shapes have to be one.

        Args:
          truth: depths; those that are not finite, or beyond the limits, are not counted.
          prediction: depths, in any unit if they are aligned.
          valid: pixels that may count; None: all.

        Raises:
          ValueError: shapes differ, no pixel counts, or a prediction that counts is not finite.
        """
        number = len(self._found)
        shapes = {truth.shape, prediction.shape, truth.shape if valid is None else valid.shape}
        if len(shapes) > 1:
            raise ValueError(f"picture {number}: truth, prediction and mask differ in shape: {shapes}")
        high = np.inf if self._cap is None else self._cap
        with np.errstate(invalid="ignore"):
            counted = np.isfinite(truth) & (truth >= self._floor) & (truth <= high)
        counted &= True if valid is None else valid
        true, said = truth[counted].astype(np.float64), prediction[counted].astype(np.float64)
        if not true.size:
            raise ValueError(f"picture {number}: no pixel of {truth.size} counts")
        if not np.isfinite(said).all():
            raise ValueError(
                f"picture {number}: {np.sum(~np.isfinite(said))} predicted depths are not finite"
            )
        said = np.clip(_aligned(true, said, self._alignment), self._floor, high)
        size = float(true.size) if self._pooled else 1.0
        errors = {k: v / true.size * size for k, v in depth_errors(true, said).items()}
        found = {f"{name}{self._suffix}": (errors[name], size) for name in _ERRORS}
        # Pooled, the root is taken of the sum of all; of a picture's own mean otherwise.
        root = errors["mse"] if self._pooled else float(np.sqrt(errors["mse"]))
        self._found.add({**found, f"rmse{self._suffix}": (root, size)}, cluster)

    def samples(self) -> dict[str, PerSample]:
        """Every error, picture by picture; pooled, ``rmse`` is left out. ValueError without a picture."""
        found = self._found.samples()
        return {k: v for k, v in found.items() if not (self._pooled and k.startswith("rmse"))}

    def compute(self) -> dict[str, float]:
        """Every error over all pictures; ValueError without a picture."""
        scores = self._found.compute()
        if self._pooled:
            scores[f"rmse{self._suffix}"] = float(np.sqrt(scores[f"mse{self._suffix}"]))
        return scores


def _aligned(truth: np.ndarray, said: np.ndarray, alignment: Alignment) -> np.ndarray:
    if alignment == "median":
        middle = np.median(said)
        return said * (np.median(truth) / middle) if middle > 0 else said
    if alignment == "least_squares":
        (scale, shift), *_ = np.linalg.lstsq(np.stack([said, np.ones_like(said)], axis=1), truth, rcond=None)
        return scale * said + shift
    return said
