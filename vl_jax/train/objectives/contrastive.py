"""Contrastive training: pictures and texts that belong together are drawn together, all others apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vl_jax.batch import Batch
from vl_jax.moe.stacks import auxiliary_and_stats
from vl_jax.train.contrastive_losses import sigmoid_sums, softmax_sums
from vl_jax.train.objectives.objective import Sums, apply


@dataclasses.dataclass(frozen=True)
class ContrastivePairs:
    """CLIP's or SigLIP's loss on the vectors of a ``Pairs`` head; rows of one picture are positives.

    The whole batch is compared, over all devices, ``chunk`` texts at a time (see ``contrastive_losses``).
    """

    head: str = "pairs"
    loss: Literal["softmax", "sigmoid"] = "softmax"  # CLIP's, SigLIP's
    chunk: int = 1024  # texts that are compared at once, at most

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be >= 1")

    @property
    def couples_rows(self) -> bool:
        """Every row is compared with all others."""
        return True

    @property
    def weights(self) -> Mapping[str, float]:
        """There is one loss."""
        return {f"{self.head}/loss": 1.0}

    def total(self, batch: Batch) -> dict[str, jax.Array]:
        """The rows that have a picture."""
        return {self.head: jnp.maximum(jnp.sum(batch.labels[self.head].present), 1).astype(jnp.float32)}

    def __call__(
        self, params: Any, state: Any, batch: Batch, *, model: nn.Module, rngs: dict[str, jax.Array] | None
    ) -> Sums:
        """The loss, and how many pictures and texts have their own nearest.

        Raises:
          ValueError: the sigmoid loss needs a bias, and the head has none.
        """
        output, collections = apply(params, state, batch, model=model, rngs=rngs)
        pairs, label = output.predictions[self.head], batch.labels[self.head]
        ids = jnp.where(label.present, label.values, -1)
        options = {"image_ids": ids, "text_ids": ids, "chunk": self.chunk}
        if self.loss == "softmax":
            sums = softmax_sums(pairs.image, pairs.text, pairs.scale, **options)
        elif pairs.bias is None:
            raise ValueError(f"loss='sigmoid' needs a bias: set bias=True of the model's head {self.head!r}")
        else:
            sums = sigmoid_sums(pairs.image, pairs.text, pairs.scale, pairs.bias, **options)
        metrics = {
            f"{self.head}/image_to_text": sums.images_right,
            f"{self.head}/text_to_image": sums.texts_right,
        }
        return Sums(
            {f"{self.head}/loss": sums.loss}, metrics, *auxiliary_and_stats(output.routed), collections
        )
