"""Who sees whom: the masks of packed, branched and cached sequences, and of pictures beside a text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from vl_jax.params import Leaf


@struct.dataclass
class PackedMask:
    """Who sees whom in a packed, branched row: earlier or same index, same segment, trunk or own branch.

    It holds what the answer follows from, [B T], and gives any part of the mask when it is needed: whole, the
    mask grows with the square of the length.
    """

    segment_ids: Leaf  # i32[B T]
    branch_ids: Leaf  # i32[B T]
    window: Leaf | None = None  # i32[] tokens that a query looks back on; 0 or None: all

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.segment_ids.shape[1]

    def part(self, first: jax.Array | int, count: int, keys: int) -> Bool[Array, "B t s"]:
        """The mask of ``count`` queries from ``first`` on, and of the first ``keys`` keys."""

        def of_queries(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, first, count, axis=1)[:, :, None]

        segments, branches = (x[:, None, :keys] for x in (self.segment_ids, self.branch_ids))
        ahead = (first + jnp.arange(count))[:, None] - jnp.arange(keys)
        reachable = (branches == 0) | (of_queries(self.branch_ids) == branches)
        seen = (ahead >= 0) & (of_queries(self.segment_ids) == segments) & reachable & (segments > 0)
        if self.window is None:
            return seen
        return seen & ((ahead < self.window) | (self.window == 0))

    @property
    def whole(self) -> Bool[Array, "B T T"]:
        """The mask of all queries and keys."""
        return self.part(0, self.length, self.length)


def within_window(
    mask: Bool[Array, "B T S"] | PackedMask, window: Int[Array, ""], *, offset: Int[Array, ""] | int = 0
) -> Bool[Array, "B T S"] | PackedMask:
    """The mask without keys that stand ``window`` or more indices before the query; 0 leaves it as it is.

    Args:
      mask: of the T queries themselves, the last T keys, and the slots of a cache before them, if any.
      offset: sequence index of the first query (the filled length of the cache).
    """
    if isinstance(mask, PackedMask):
        return mask.replace(window=window)  # pyright: ignore[reportAttributeAccessIssue]
    queries, slots = jnp.arange(mask.shape[1]) + offset, mask.shape[2] - mask.shape[1]
    keys = jnp.concatenate([jnp.arange(slots), queries])
    near = queries[:, None] - keys[None, :] < window
    return mask & (near | (window == 0))


def cross_mask(
    segment_ids: Int[Array, "B T"],
    visual_start: Int[Array, "B S"],
    visual_segment_ids: Int[Array, "B S"],
    *,
    offset: Int[Array, ""] | int = 0,
) -> Bool[Array, "B T S"]:
    """Which visual tokens a text token may look at: those of its segment whose image already appeared.

    Args:
      offset: sequence index of the first query (the filled length of a cache).
    """
    index = jnp.arange(segment_ids.shape[1]) + offset
    same_segment = segment_ids[:, :, None] == visual_segment_ids[:, None, :]
    appeared = visual_start[:, None, :] <= index[None, :, None]
    return same_segment & appeared & (visual_segment_ids[:, None, :] > 0)
