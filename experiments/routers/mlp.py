"""A router of two layers: top-k over the logits of a small MLP of the scheme's own parameters.

    python -m vl_jax conformance experiments/routers/mlp.py:mlp
    python -m vl_jax train --config=quickstart --workdir=runs/mlp \\
        --config.model.moe.scheme=experiments/routers/mlp.py:mlp
"""

import dataclasses

import jax.numpy as jnp

from vl_jax.moe.routing import Param
from vl_jax.moe.schemes.token_choice import TOP_K


def params(width, config):
    """Two matrices."""
    hidden = config.option("hidden")
    return {
        "w_in": Param((width, hidden), ("embed", None)),
        "w_out": Param((hidden, config.num_experts), (None, None)),
    }


def logits(x, context, config):
    """What stands for the linear router."""
    return jnp.tanh(x @ context.params["w_in"]) @ context.params["w_out"]


mlp = dataclasses.replace(TOP_K, params=params, logits=logits, defaults={**TOP_K.defaults, "hidden": 16})
