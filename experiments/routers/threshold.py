"""A block router of one's own: every token decides for itself whether to take a layer, as in decoding.

    python -m vl_jax train --config=quickstart --workdir=runs/depths \\
        --config.model.language.depths.layers=1, \\
        --config.model.language.depths.router.scheme=experiments/routers/threshold.py:threshold

A loss draws the mean chance to ``share``. It never looks ahead, so training and decoding agree at once. But
how many take the layer varies, and training keeps room for all; ``predicted_choice`` has a bound.
"""

import jax
import jax.numpy as jnp

from vl_jax.moe.losses import mean
from vl_jax.moe.routing import Scheme, TokenChoice


def route(logits, context, state, config):
    """An expert is taken where its chance is above one half, which is also what its output weighs."""
    chances, experts = jax.nn.sigmoid(logits), config.num_experts
    chosen = context.valid[:, None] & (chances > 0.5)
    if context.excluded is not None:
        chosen = chosen & ~context.excluded
    over = mean(chances - config.option("share"), context.valid)  # 0 where all is padding
    ids = jnp.where(chosen, jnp.arange(experts, dtype=jnp.int32), experts)
    losses = {"share": config.option("weight") * jnp.mean(over**2)}
    return TokenChoice(ids, jnp.where(chosen, chances, 0.0)), losses


threshold = Scheme(
    route,
    defaults={"share": 0.5, "weight": 1.0},
    scores=lambda logits, config: jax.nn.sigmoid(logits) / config.num_experts,
)
