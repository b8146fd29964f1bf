"""A fixed batch whose choices of experts are watched while the model trains."""

from __future__ import annotations

import jax

from vl_jax.batch import Batch
from vl_jax.evaluate.routes import churn, routes
from vl_jax.layout import Layout, put_batch
from vl_jax.moe.stacks import Stacks, log_name
from vl_jax.nn.low_rank import EVERYWHERE, Only
from vl_jax.train import lora
from vl_jax.train.hooks import Moment
from vl_jax.train.step import Metrics, TrainState


class Probe:
    """Tells how many of the batch's choices a training step changes; a ``Hook``."""

    def __init__(self, layout: Layout, batch: Batch, *, every: int = 1):
        """Takes the batch.

        Args:
          every: how many steps there are from one that is watched to the next.

        Raises:
          ValueError: the model has no experts.
        """
        self._stacks: Stacks = layout.model.config.stacks
        if not self._stacks:
            raise ValueError("loop.churn=True: the model has no layers with experts")
        self._batch, self._every = put_batch(batch, layout), every
        self._before: dict[str, jax.Array] = {}

        def choose(state: TrainState, batch: Batch, scale: float, only: Only) -> dict[str, jax.Array]:
            params = lora.merge(state.params, state.adapters, scale, layout.roles, only)
            return routes(params, state.routing, batch, model=layout.model, collections=state.collections)

        self._choose = jax.jit(choose, static_argnums=(2, 3))
        self._compare = jax.jit(churn, static_argnames="num_experts")

    def before_step(self, state: TrainState, moment: Moment) -> None:
        """Looks at the choices, if the step is watched."""
        if moment.is_due(self._every):
            self._before = self._seen(state, moment)

    def after_step(self, state: TrainState, metrics: Metrics, moment: Moment) -> Metrics:
        """Adds the share of choices that the step changed, if it is watched."""
        if not moment.is_due(self._every):
            return metrics
        return metrics | self.compare(self._before, self._seen(state, moment))

    def _seen(self, state: TrainState, moment: Moment) -> dict[str, jax.Array]:
        return self.look(state, lora_scale=moment.stage.lora_scale, lora_only=moment.stage.lora_only)

    def look(
        self, state: TrainState, *, lora_scale: float, lora_only: Only = EVERYWHERE
    ) -> dict[str, jax.Array]:
        """The experts that the batch's tokens choose, ``i32[L B T K]`` by stack.

        Raises:
          ValueError: tokens of the scheme have no choice of their own.
        """
        return self._choose(state, self._batch, lora_scale, lora_only)

    def compare(self, before: dict[str, jax.Array], after: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The share of choices that are new, ``f32[L]`` by the name it is logged with."""
        return {
            log_name(name, "churn", self._stacks): self._compare(
                before[name], after[name], num_experts=stack.moe.num_experts
            )
            for name, stack in self._stacks.items()
        }
