"""A router that remembers: the logits of the layer before are added to its own, by a learned share.

    python -m vl_jax conformance experiments/routers/recurrent.py:recurrent

A small relative of routers whose decision is handed from layer to layer (Layerwise Recurrent Router,
arXiv 2408.06793). The first sparse layer finds zeros.
"""

import jax
import jax.numpy as jnp
from jax.nn import initializers

from vl_jax.moe.routing import Param, Scheme, TokenChoice, best, gates_of


def params(width, config):
    """One number: how much the past counts."""
    return {"share": Param((), (), initializers.constant(0.5), decay=False)}


def scores(logits, context, config):
    """Probabilities from the logits of both layers."""
    return jax.nn.softmax(logits + context.params["share"] * context.previous, axis=-1)


def route(logits, context, state, config):
    """The best experts by these scores."""
    by_expert = scores(logits, context, config)
    experts = best(by_expert, config.top_k, context)
    used = context.valid[:, None] & (experts < config.num_experts)
    gates = jnp.where(used, gates_of(by_expert, experts), 0.0)
    return TokenChoice(jnp.where(used, experts, config.num_experts), gates), {}


recurrent = Scheme(route, params=params, scores_of_group=scores, previous=True, replays=True)
