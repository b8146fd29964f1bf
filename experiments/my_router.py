"""A routing scheme of one's own in the model of the quickstart; no file of the package is touched.

    python -m vl_jax conformance experiments/my_router.py:my_router
    python -m vl_jax sweep --config=experiments/my_router.py --sweep=baselines --workdir=runs/routers

Experts that were crowded lately are less attractive: selection is by sigmoid score less ``push`` times how
far the expert's share of the load, averaged over steps, is above an even one.
"""

import dataclasses

import jax
import jax.numpy as jnp

from vl_jax import config
from vl_jax.moe.routing import Scheme, TokenChoice, best, gates_of


def route(logits, context, state, config):
    """The top experts by score less crowding; gates are the scores."""
    scores = jax.nn.sigmoid(logits)
    crowding = config.num_experts * state["share"] - 1
    experts = best(scores - config.option("push") * crowding, config.top_k, context)
    gates = gates_of(scores, experts)
    valid = context.valid[:, None]  # an id of num_experts is "no expert"
    return TokenChoice(jnp.where(valid, experts, config.num_experts), jnp.where(valid, gates, 0.0)), {}


def init_state(config):
    """An even share for every expert."""
    return {"share": jnp.full((config.num_experts,), 1 / config.num_experts)}


def update_state(state, stats, config):
    """Moves the shares a tenth of the way to those of the step."""
    load = stats.load.sum(axis=0).astype(jnp.float32)
    return {"share": 0.9 * state["share"] + 0.1 * load / jnp.maximum(load.sum(), 1.0)}


my_router = Scheme(route, init_state, update_state, defaults={"push": 0.1}, replays=True)


def sweep_baselines():
    """``my_router`` and the schemes it has to beat, on equal terms."""
    for scheme in (f"{__file__}:my_router", "top_k", "loss_free", "expert_choice"):
        yield {"model.moe.scheme": scheme}


def get_config():
    """The quickstart with ``my_router`` in every sparse layer."""
    experiment = config.load("quickstart")
    moe = dataclasses.replace(experiment.model.moe, scheme=f"{__file__}:my_router")
    model = dataclasses.replace(experiment.model, moe=moe)
    return config.view(dataclasses.replace(experiment, name="my_router", model=model))
