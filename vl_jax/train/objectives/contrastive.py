"""Contrastive training: pictures and texts that belong together are drawn together, all others apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from vl_jax.batch import Batch
from vl_jax.heads.pairs import PairVectors
from vl_jax.moe.stacks import RoutingState
from vl_jax.params import flatten
from vl_jax.train.objectives.contrastive_losses import sigmoid_sums, softmax_sums
from vl_jax.train.objectives.objective import Sums, apply, beside
from vl_jax.train.objectives.rows import give, given_rows, join_rows, split_rows

Rngs = dict[str, jax.Array] | None
# What the model brings beside the vectors: losses of the router, and sums by stack and by gate.
Beside = tuple[jax.Array, dict[str, Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class ContrastivePairs:
    """CLIP's or SigLIP's loss on the vectors of a ``Pairs`` head; rows of one picture are positives.

    The whole batch is compared, over all devices, ``chunk`` texts at a time (see ``contrastive_losses``).
    The model itself may see it in ``micro_batches``, one after the other: memory is that of one of them, and
    loss and gradient are those of the whole batch (gradient caching, arXiv 2101.06983). The model then runs
    twice, with the same random numbers both times. Losses of the router are means over the micro-batches.
    """

    head: str = "pairs"
    loss: Literal["softmax", "sigmoid"] = "softmax"  # CLIP's, SigLIP's
    chunk: int = 1024  # texts that are compared at once, at most
    micro_batches: int = 1  # parts of the batch that the model sees one after the other

    def __post_init__(self):
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches={self.micro_batches} must be >= 1")
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

    def __call__(self, params: Any, state: Any, batch: Batch, *, model: nn.Module, rngs: Rngs) -> Sums:
        """The loss, and how many pictures and texts have their own nearest.

        Raises:
          ValueError: the sigmoid loss needs a bias, and the head has none; rows do not divide by
            ``micro_batches``; the model has statistics of the batch, which micro-batches would change.
        """
        run = self._whole if self.micro_batches == 1 else self._in_parts
        pairs, (auxiliary, stats, gates), collections = run(params, state, batch, model=model, rngs=rngs)
        label = batch.labels[self.head]
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
        return Sums({f"{self.head}/loss": sums.loss}, metrics, auxiliary, stats, collections, gates)

    def _whole(
        self, params: Any, state: Any, batch: Batch, *, model: nn.Module, rngs: Rngs
    ) -> tuple[PairVectors, Beside, dict[str, Any]]:
        """Vectors, what comes beside them, and new collections."""
        output, collections = apply(params, state, batch, model=model, rngs=rngs)
        return output.predictions[self.head], beside(output), collections

    def _in_parts(
        self, params: Any, state: Any, batch: Batch, *, model: nn.Module, rngs: Rngs
    ) -> tuple[PairVectors, Beside, dict[str, Any]]:
        """Likewise, a micro-batch at a time.

        Only vectors outlive a part's forward pass. The loss gives their gradient, and the backward pass runs
        each part again from its rows and its key, to carry that gradient on into the parameters.
        """
        parts, rows = self.micro_batches, batch.tokens.shape[0]
        if rows % parts:
            raise ValueError(f"micro_batches={parts} does not divide the {rows} rows of a batch")

        def one(part: tuple[Batch, RoutingState, jax.Array]) -> tuple[PairVectors, Beside]:
            some, given, index = part
            own = dataclasses.replace(state, routing=give(state.routing, given))
            keys = rngs and {name: jax.random.fold_in(key, index) for name, key in rngs.items()}
            vectors, found, changed = self._whole(params, own, some, model=model, rngs=keys)
            _refuse_moving(state.collections, changed, parts)
            return vectors, found

        micro = split_rows((batch, given_rows(state.routing, rows)), parts)
        # Inside a loop nothing is merged with the first pass, so no barrier against that is needed.
        body = jax.checkpoint(one, prevent_cse=False)  # pyright: ignore[reportPrivateImportUsage]
        pairs, (auxiliary, *sums) = jax.lax.map(body, (*micro, jnp.arange(parts)))
        bias = None if pairs.bias is None else pairs.bias[0]
        image, text = join_rows((pairs.image, pairs.text))
        stats, gates = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
        return PairVectors(image, text, pairs.scale[0], bias), (jnp.mean(auxiliary), stats, gates), {}


def _refuse_moving(before: Mapping[str, Any], after: Mapping[str, Any], parts: int) -> None:
    """Refuses a model that writes collections; one that only reads them hands on the very same arrays."""
    old = flatten(dict(before))
    moved = [path for path, leaf in flatten(dict(after)).items() if leaf is not old.get(path)]
    if moved:
        raise ValueError(
            f"micro_batches={parts}: {moved[0]} is made of all rows of a batch, so the gradient would be "
            "another; freeze the statistics of the batch, or set micro_batches=1"
        )
