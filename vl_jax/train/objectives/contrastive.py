"""Contrastive training: pictures and texts that belong together are drawn together, all others apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vl_jax.batch import Batch
from vl_jax.heads.pairs import FOREIGN, PairVectors
from vl_jax.moe.stacks import RoutingState
from vl_jax.params import flatten
from vl_jax.train.objectives.contrastive_losses import sigmoid_sums, softmax_sums
from vl_jax.train.objectives.hard_negatives import check
from vl_jax.train.objectives.objective import Sums, apply, beside
from vl_jax.train.objectives.rows import give, given_rows, join_rows, split_rows
from vl_jax.train.objectives.wrong_texts import as_rows, present

Rngs = dict[str, jax.Array] | None
# What the model brings beside the vectors: losses of the router, and sums by stack and by gate.
Beside = tuple[jax.Array, dict[str, Any], dict[str, Any]]
Vectors = tuple[PairVectors, jax.Array | None]  # those of pictures and texts, and of wrong texts [B N E]


@dataclasses.dataclass(frozen=True)
class ContrastivePairs:
    """CLIP's or SigLIP's loss on the vectors of a ``Pairs`` head; rows of one picture are positives.

    The whole batch is compared, over all devices, ``chunk`` texts at a time (see ``contrastive_losses``).
    The model itself may see it in ``micro_batches``, one after the other: memory is that of one of them, and
    loss and gradient are those of the whole batch (gradient caching, arXiv 2101.06983). The model then runs
    twice, with the same random numbers both times. Losses of the router are means over the micro-batches.

    With ``drop`` the pairs that the model finds least alike are taken for ill-matched: a later stage can so
    filter what an earlier one has learned to score.

    With ``negatives`` the wrong texts of a batch are further texts, which no picture has (NegCLIP, arXiv
    2210.01936). Their experts count in no loss or statistic of the router.
    """

    head: str = "pairs"
    loss: Literal["softmax", "sigmoid"] = "softmax"  # CLIP's, SigLIP's
    hardness: float = (
        0.0  # how much more the harder negatives of a row count (see ``hard_negatives``); 0: alike
    )
    negatives: bool = False  # whether wrong texts count too, see ``data.conversation``
    drop: float = 0.0  # share of a batch's pairs that count in no loss: those whose vectors agree least
    chunk: int = 1024  # texts that are compared at once, at most
    micro_batches: int = 1  # parts of the batch that the model sees one after the other

    def __post_init__(self):
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches={self.micro_batches} must be >= 1")
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be >= 1")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop={self.drop} must be in [0, 1)")
        check(self.hardness)

    @property
    def couples_rows(self) -> bool:
        """Every row is compared with all others."""
        return True

    @property
    def weights(self) -> Mapping[str, float]:
        """There is one loss."""
        return {f"{self.head}/loss": 1.0}

    def total(self, batch: Batch) -> dict[str, jax.Array]:
        """The rows that have a picture; and their wrong texts."""
        totals = {self.head: kept_of(jnp.sum(batch.labels[self.head].present), self.drop)}
        if self.negatives:
            totals[f"{self.head}/wrong"] = jnp.sum(present(batch, self.head))
        return {name: jnp.maximum(count, 1).astype(jnp.float32) for name, count in totals.items()}

    def __call__(self, params: Any, state: Any, batch: Batch, *, model: nn.Module, rngs: Rngs) -> Sums:
        """The loss, and how many pictures and texts have their own nearest.

        Raises:
          ValueError: the sigmoid loss needs a bias, and the head has none; rows do not divide by
            ``micro_batches``; the model has statistics of the batch, which micro-batches would change; there
            are no wrong texts.
        """
        run = self._whole if self.micro_batches == 1 else self._in_parts
        (pairs, wrong), (auxiliary, stats, gates), collections = run(
            params, state, batch, model=model, rngs=rngs
        )
        label = batch.labels[self.head]
        there = label.present
        if self.drop:
            there = best_pairs(jnp.sum(pairs.image * pairs.text, axis=1), there, self.drop)
        ids = jnp.where(there, label.values, -1)
        texts, text_ids, metrics = pairs.text, ids, {}
        if wrong is not None:
            given = present(batch, self.head)
            texts = jnp.concatenate([texts[:, None], wrong], axis=1).reshape(-1, texts.shape[-1])
            others = jnp.where(given, FOREIGN, -1)
            text_ids = jnp.concatenate([ids[:, None], others], axis=1).reshape(-1)
            metrics = _told_apart(self.head, pairs, wrong, given)
        options = {"image_ids": ids, "text_ids": text_ids, "chunk": self.chunk, "hardness": self.hardness}
        if self.loss == "softmax":
            sums = softmax_sums(pairs.image, texts, pairs.scale, **options)
        elif pairs.bias is None:
            raise ValueError(f"loss='sigmoid' needs a bias: set bias=True of the model's head {self.head!r}")
        else:
            sums = sigmoid_sums(pairs.image, texts, pairs.scale, pairs.bias, **options)
        metrics |= {
            f"{self.head}/image_to_text": sums.images_right,
            f"{self.head}/text_to_image": sums.texts_right,
        }
        return Sums({f"{self.head}/loss": sums.loss}, metrics, auxiliary, stats, collections, gates)

    def _whole(
        self, params: Any, state: Any, batch: Batch, *, model: nn.Module, rngs: Rngs
    ) -> tuple[Vectors, Beside, dict[str, Any]]:
        """Vectors, what comes beside them, and new collections."""
        output, collections = apply(params, state, batch, model=model, rngs=rngs)
        wrong = None
        if self.negatives:
            read, _ = apply(params, state, as_rows(batch), model=model, rngs=rngs)
            text = read.predictions[self.head].text
            wrong = text.reshape(batch.tokens.shape[0], -1, text.shape[-1])
        return (output.predictions[self.head], wrong), beside(output), collections

    def _in_parts(
        self, params: Any, state: Any, batch: Batch, *, model: nn.Module, rngs: Rngs
    ) -> tuple[Vectors, Beside, dict[str, Any]]:
        """Likewise, a micro-batch at a time.

        Only vectors outlive a part's forward pass. The loss gives their gradient, and the backward pass runs
        each part again from its rows and its key, to carry that gradient on into the parameters.
        """
        parts, rows = self.micro_batches, batch.tokens.shape[0]
        if rows % parts:
            raise ValueError(f"micro_batches={parts} does not divide the {rows} rows of a batch")

        def one(part: tuple[Batch, RoutingState, jax.Array]) -> tuple[Vectors, Beside]:
            some, given, index = part
            own = dataclasses.replace(state, routing=give(state.routing, given))
            keys = rngs and {name: jax.random.fold_in(key, index) for name, key in rngs.items()}
            vectors, found, changed = self._whole(params, own, some, model=model, rngs=keys)
            _refuse_moving(state.collections, changed, parts)
            return vectors, found

        micro = split_rows((batch, given_rows(state.routing, rows)), parts)
        # Inside a loop nothing is merged with the first pass, so no barrier against that is needed.
        body = jax.checkpoint(one, prevent_cse=False)  # pyright: ignore[reportPrivateImportUsage]
        (pairs, wrong), (auxiliary, *sums) = jax.lax.map(body, (*micro, jnp.arange(parts)))
        bias = None if pairs.bias is None else pairs.bias[0]
        image, text, wrong = join_rows((pairs.image, pairs.text, wrong))
        stats, gates = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
        whole = PairVectors(image, text, pairs.scale[0], bias)
        return (whole, wrong), (jnp.mean(auxiliary), stats, gates), {}


def kept_of(count: jax.Array, drop: float) -> jax.Array:
    """How many of so many pairs are kept."""
    return count - jnp.floor(drop * count.astype(jnp.float32)).astype(count.dtype)


def best_pairs(nearness: Float[Array, " B"], present: Bool[Array, " B"], drop: float) -> Bool[Array, " B"]:
    """The pairs that are there without that share of them which is least near, by what the model now says.

    Wrong texts of pictures are learned late, so a model that has learned something puts them last: Han et al.
    2018, arXiv 1804.06872, drop the highest losses of a batch likewise.
    """
    order = jnp.argsort(jnp.where(present, -jax.lax.stop_gradient(nearness), jnp.inf))
    rank = jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))
    return present & (rank < kept_of(jnp.sum(present), drop))


def _told_apart(head: str, pairs: PairVectors, wrong: jax.Array, there: jax.Array) -> dict[str, jax.Array]:
    """How many wrong texts are less like their picture than its own text; how many pictures have any."""
    own, others = (jnp.sum(pairs.image[:, None] * texts, axis=2) for texts in (pairs.text[:, None], wrong))
    return {
        f"{head}/wrong/told_apart": jnp.sum(there & (others < own), dtype=jnp.float32),
        f"{head}/with_wrong_text": jnp.sum(jnp.any(there, axis=1), dtype=jnp.float32),
    }


def _refuse_moving(before: Mapping[str, Any], after: Mapping[str, Any], parts: int) -> None:
    """Refuses a model that writes collections; one that only reads them hands on the very same arrays."""
    old = flatten(dict(before))
    moved = [path for path, leaf in flatten(dict(after)).items() if leaf is not old.get(path)]
    if moved:
        raise ValueError(
            f"micro_batches={parts}: {moved[0]} is made of all rows of a batch, so the gradient would be "
            "another; freeze the statistics of the batch, or set micro_batches=1"
        )
