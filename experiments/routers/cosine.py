"""A cosine router: how near a token is to every expert's direction, sharpened by a learned temperature.

    python -m vl_jax conformance experiments/routers/cosine.py:cosine

After X-MoE (arXiv 2204.09179): tokens are projected first; the temperature stays above ``least``.
"""

import dataclasses

import jax.numpy as jnp
from jax.nn import initializers

from vl_jax.moe.routing import Param
from vl_jax.moe.schemes.token_choice import TOP_K


def params(width, config):
    """A projection, a direction for every expert, and a temperature."""
    dim, warm = config.option("dim"), initializers.constant(0.07)
    return {
        "project": Param((width, dim), ("embed", None)),
        "experts": Param((dim, config.num_experts), (None, None)),
        "temperature": Param((), (), warm, decay=False),
    }


def unit(x, axis):
    """Vectors of length one; zeros stay zeros."""
    return x / jnp.sqrt(jnp.sum(x * x, axis=axis, keepdims=True) + 1e-12)


def logits(x, context, config):
    """Cosines over the temperature."""
    p = context.params
    cosines = unit(x @ p["project"], -1) @ unit(p["experts"], 0)
    return cosines / jnp.maximum(jnp.abs(p["temperature"]), config.option("least"))


OPTIONS = {**TOP_K.defaults, "dim": 8, "least": 0.01}
cosine = dataclasses.replace(TOP_K, params=params, logits=logits, defaults=OPTIONS)
