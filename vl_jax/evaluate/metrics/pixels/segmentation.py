"""Classes of pixels, and masks of what a phrase refers to.

    IoU of a class = pixels called so and being so / pixels called so or being so, over the whole set
    mIoU           = mean over the classes that occur or were called

The mean over pictures of the IoU of each is another number. Of masks, ``ciou`` (cumulative, as RefCOCO's
papers call "overall IoU") adds up pixels over the set and so weighs large objects more; ``giou`` is the
mean over masks. Source: Everingham et al., "Pascal VOC", 2010; Yang et al., "LAVT", 2022, for the two
forms.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Int

from vl_jax.evaluate.metrics.classification import confusion_matrix
from vl_jax.evaluate.metrics.per_sample import PerSample, SampleList


class SegmentationScores:
    """mIoU and the share of right pixels, over all pictures.

    Args:
      num_classes: of pixels.
      ignore: the class of pixels that are not counted.
    """

    def __init__(self, num_classes: int, *, ignore: int = 255):
        self._confusion = np.zeros((num_classes, num_classes), np.int64)
        self._ignore = ignore
        self._pixels = SampleList(("pixel_accuracy",))

    def update(
        self, truth: Int[np.ndarray, "H W"], prediction: Int[np.ndarray, "h w"], *, cluster: str | None = None
    ) -> None:
        """Takes one picture; both shapes have to be one.

        Raises:
          ValueError: the shapes differ, or a class that counts is not one of ``num_classes``.
        """
        number = len(self._pixels)
        if truth.shape != prediction.shape:
            raise ValueError(f"picture {number}: truth {truth.shape}, prediction {prediction.shape}")
        counted = truth.ravel() != self._ignore
        true, said = truth.ravel()[counted].astype(np.int64), prediction.ravel()[counted].astype(np.int64)
        if (true < 0).any():
            raise ValueError(f"picture {number}: truth {true.min()} is no class")
        try:
            confusion = confusion_matrix(true, said, len(self._confusion))
        except ValueError as error:
            raise ValueError(f"picture {number}: {error}") from None
        self._confusion += confusion
        right = float(np.trace(confusion)), float(confusion.sum())
        self._pixels.add({"pixel_accuracy": right}, cluster)

    @property
    def confusion(self) -> np.ndarray:
        """Pixels by true and by called class, i64[K K]."""
        return self._confusion

    def by_class(self) -> np.ndarray:
        """The IoU of each class; not a number for a class that neither occurs nor was called."""
        right = np.diagonal(self._confusion).astype(np.float64)
        either = self._confusion.sum(axis=0) + self._confusion.sum(axis=1) - right
        return np.divide(right, either, out=np.full_like(right, np.nan), where=either > 0)

    def samples(self) -> dict[str, PerSample]:
        """The right pixels of each picture; mIoU is no mean of pictures. ValueError without a picture."""
        return self._pixels.samples()

    def compute(self) -> dict[str, float]:
        """``mean_iou`` and ``pixel_accuracy``; ValueError without a pixel that counts."""
        scores = self._pixels.compute()
        if not self._confusion.any():
            raise ValueError(f"mIoU: no pixel of {len(self._pixels)} picture(s) counts")
        return {"mean_iou": float(np.nanmean(self.by_class())), **scores}


class MaskScores:
    """``giou`` and ``ciou`` of one mask for each phrase."""

    def __init__(self):
        self._found = SampleList(("giou", "ciou"))

    def update(
        self,
        truth: Bool[np.ndarray, "H W"],
        prediction: Bool[np.ndarray, "h w"],
        *,
        cluster: str | None = None,
    ) -> None:
        """Takes one phrase. Where both masks are empty, as for a phrase without an object, ``giou`` has 1.

        Raises:
          ValueError: the shapes differ.
        """
        if truth.shape != prediction.shape:
            raise ValueError(f"sample {len(self._found)}: truth {truth.shape}, prediction {prediction.shape}")
        both, either = float(np.sum(truth & prediction)), float(np.sum(truth | prediction))
        self._found.add({"giou": both / either if either else 1.0, "ciou": (both, either)}, cluster)

    def samples(self) -> dict[str, PerSample]:
        """Both scores, sample by sample; ValueError without a sample."""
        return self._found.samples()

    def compute(self) -> dict[str, float]:
        """Both scores over all samples; ValueError without a sample."""
        return self._found.compute()
