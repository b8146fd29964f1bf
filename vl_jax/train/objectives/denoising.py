"""Denoising: heads that make what they say out of noise learn the way from noise to their labels."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax

from vl_jax.batch import Batch, Given, hint_of
from vl_jax.train.objectives.heads import Heads


@dataclasses.dataclass(frozen=True)
class Denoising(Heads):
    """``Heads`` that hands noisy labels to the heads that learn from them; the others learn as they do.

    Noise follows from the step and from the label itself, so the order of rows, accumulation and sharding
    change nothing. Where nothing is drawn, as in an evaluation, it follows from the label alone.
    """

    heads: tuple[str, ...] = ("picture",)

    def _hints(self, batch: Batch, model: nn.Module, rngs: dict[str, jax.Array] | None) -> dict[str, Given]:
        """Those of ``Heads``, and noisy labels.

        Raises:
          ValueError: no head learns from noise.
        """
        hints = {}
        for index, name in enumerate(self.heads):
            head: Any = model.config.head(name)  # pyright: ignore[reportAttributeAccessIssue]
            if hasattr(head, "noised"):
                key = rngs[head.rng] if rngs and head.rng in rngs else jax.random.key(0)
                label = batch.labels[name]
                noisy = head.noised(label, jax.random.fold_in(key, index))
                hints[hint_of(name)] = Given(noisy, label.present)
        if not hints:
            raise ValueError(f"heads={self.heads}: none learns from noise; train them by Heads")
        return super()._hints(batch, model, rngs) | hints
