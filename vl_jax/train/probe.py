"""A fixed batch whose choices of experts are watched while the model trains."""

from __future__ import annotations

import functools

import jax

from vl_jax.batch import Batch
from vl_jax.evaluate.routes import churn, routes
from vl_jax.layout import Layout, put_batch
from vl_jax.train import lora
from vl_jax.train.step import TrainState


class Probe:
    """Tells how many of the batch's choices a training step changes."""

    def __init__(self, layout: Layout, batch: Batch):
        """Takes the batch.

        Raises:
          ValueError: the model has no experts.
        """
        if not layout.model.config.num_sparse_layers:
            raise ValueError("loop.churn=True: the model has no layers with experts")
        self._batch = put_batch(batch, layout)

        def choose(state: TrainState, batch: Batch, scale: float) -> jax.Array:
            params = lora.merge(state.params, state.adapters, scale, layout.roles)
            return routes(params, state.routing, batch, model=layout.model)

        self._choose = jax.jit(choose, static_argnums=2)
        self._compare = jax.jit(functools.partial(churn, num_experts=layout.model.config.moe.num_experts))

    def look(self, state: TrainState, *, lora_scale: float) -> jax.Array:
        """The experts that the batch's tokens choose, ``i32[L B T K]``.

        Raises:
          ValueError: tokens of the scheme have no choice of their own.
        """
        return self._choose(state, self._batch, lora_scale)

    def compare(self, before: jax.Array, after: jax.Array) -> dict[str, jax.Array]:
        """The share of choices that are new, by layer: ``f32[L]``."""
        return {"routing/churn": self._compare(before, after)}
