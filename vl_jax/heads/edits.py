"""How many edits make one text of another, in a program: Levenshtein's distance over rows of symbols."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def edit_distances(said: Int[Array, "B T"], texts: Int[Array, "B N"], *, none: int) -> Float[Array, " B"]:
    """The fewest symbols to change, leave out or put in, for every row.

    Args:
      said: ``none`` stands for no symbol, anywhere in the row.
      texts: ``none`` stands behind the last symbol.
    """
    order = jnp.arange(texts.shape[1] + 1, dtype=jnp.float32)
    beginning = jnp.broadcast_to(order, (len(texts), len(order)))

    def hear(before: jax.Array, symbol: jax.Array) -> tuple[jax.Array, None]:
        """From the distances of what was said so far to each beginning of the text, those with one more."""
        changed = before[:, :-1] + (symbol[:, None] != texts).astype(jnp.float32)
        left_out = before + 1
        best = jnp.concatenate([left_out[:, :1], jnp.minimum(left_out[:, 1:], changed)], axis=1)
        # Symbols may be put in anywhere: each costs one, so less their number the best so far is kept.
        after = jax.lax.cummin(best - order, axis=1) + order
        return jnp.where(symbol[:, None] == none, before, after), None

    distances, _ = jax.lax.scan(hear, beginning, said.T)
    length = jnp.sum(texts != none, axis=1)
    return jnp.take_along_axis(distances, length[:, None], axis=1)[:, 0]
