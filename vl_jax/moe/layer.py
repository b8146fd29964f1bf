"""The mixture-of-experts layer: router -> assignment -> capacity -> experts (+ shared), and statistics."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from vl_jax.moe import balance, dispatch, exchange, routing
from vl_jax.moe.routing import MoEConfig, RoutingContext, RoutingStats, State
from vl_jax.nn.layers import SwiGLU, fan_in, named

Leaf = Any


@struct.dataclass
class MoEOutput:
    """What a sparse layer returns besides its output."""

    stats: RoutingStats
    losses: Leaf  # dict of scalars, already weighted


class DynamicMoE(nn.Module):
    """Routed experts by the configured scheme, plus shared experts that every token takes."""

    config: MoEConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: RoutingContext, state: State
    ) -> tuple[Float[Array, "B T D"], MoEOutput]:
        c, width = self.config, x.shape[-1]
        router = self.param("router", named(fan_in(), "embed", None), (width, c.num_experts))
        init = named(fan_in(in_axis=1, batch_axis=(0,)), "experts", "embed", None, "mlp")
        w_in = self.param("w_in", init, (c.num_experts, width, 2, c.expert_dim))
        init = named(fan_in(in_axis=1, batch_axis=(0,)), "experts", "mlp", "embed")
        w_out = self.param("w_out", init, (c.num_experts, c.expert_dim, width))
        y, output = sparse_mlp(
            x, router, w_in.astype(x.dtype), w_out.astype(x.dtype), context=context, state=state, config=c
        )
        if c.num_shared:
            y = y + SwiGLU(c.num_shared * c.expert_dim, name="shared")(x)
        return y, output


def sparse_mlp(
    x: Float[Array, "B T D"],
    router: Float[Array, "D E"],
    w_in: Float[Array, "E D 2 F"],
    w_out: Float[Array, "E F D"],
    *,
    context: RoutingContext,
    state: State,
    config: MoEConfig,
) -> tuple[Float[Array, "B T D"], MoEOutput]:
    """The routed experts as a pure function; every row of the batch is one routing group."""
    logits = jnp.einsum(
        "BTD,DE->BTE", x.astype(jnp.float32), router.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    assignment, losses = routing.route(logits, context, state, config)
    kept, dropped = dispatch.apply_capacity(assignment, context.valid, config)
    stats = balance.count(assignment, dropped, jax.nn.softmax(logits, axis=-1), context)
    y = exchange.apply_experts(x, kept, w_in, w_out, kernel=config.kernel)
    return y, MoEOutput(stats=jax.lax.stop_gradient(stats), losses=losses)
