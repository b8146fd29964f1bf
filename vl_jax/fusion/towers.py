"""Towers that are left out: a sample's words decide whether it looks, before anything reads its pictures.

    words before the first answer --> logits --> open rows --> the tower reads these, 0 for the others

Only where a whole row decides: a token knows what it wants in the layers alone, after the tower has run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from vl_jax.batch import Batch
from vl_jax.fusion.budget import LEARNING
from vl_jax.fusion.skipping import open_rows
from vl_jax.params import Leaf


@struct.dataclass
class Seen:
    """What is made of a row's pictures once, where the row decides whether it looks at them."""

    vision: Leaf  # [B S D]
    looks: Leaf  # f32[B L] logits


def before_answers(batch: Batch) -> Bool[Array, "B T"]:
    """The tokens of each row up to the first that is predicted from; all of them where nothing is."""
    length = batch.tokens.shape[1]
    first = jnp.where(batch.loss_weights > 0, batch.target_index, length)
    first = jnp.min(first, axis=1, initial=length, keepdims=True)
    return (batch.segment_ids > 0) & (jnp.arange(length) <= first)


def looking(logits: Float[Array, "B L"], batch: Batch) -> Bool[Array, " B"]:
    """The rows that look at something in some layer."""
    return jnp.any(logits >= 0, axis=1) & jnp.any(batch.visual_segment_ids > 0, axis=1)


def only_infers(module: nn.Module) -> bool:
    """Whether nothing but the output comes of a pass: nothing learns, is noted, or moves."""
    names = ("params", "intermediates", *module.variables)
    return not module.has_rng(LEARNING) and not any(map(module.is_mutable_collection, names))


def read_open_rows(
    module: nn.Module,
    method: str,
    is_open: Bool[Array, " B"],
    rows: Any,
    *,
    parts: Iterable[str],
    buckets: int,
) -> tuple[Any, Float[Array, ""]]:
    """What a method makes of the rows that are open, 0 for the others; and the number of rows it was run for.

    Args:
      method: of the module, from a tree of rows to an array or a tree of them; no row acts on another.
      parts: the submodules whose variables it needs.
      buckets: see ``skipping.open_rows``.
    """
    free = module.clone(parent=None, name=None)  # a branch cannot hold a bound module
    needed = {name: {part: of[part] for part in parts if part in of} for name, of in module.variables.items()}

    def compute(variables: Any, rows: Any) -> Any:
        return free.apply(variables, rows, method=method)

    return open_rows(compute, is_open, needed, rows, buckets=buckets)
