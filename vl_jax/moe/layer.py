"""The mixture-of-experts layer: router -> assignment -> capacity -> experts (+ shared), and statistics."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.moe import balance, dispatch, exchange, noise, routing
from vl_jax.moe.assignment import Merge
from vl_jax.moe.routing import MoEConfig, RoutingContext, RoutingStats, State
from vl_jax.nn.layers import GatedMLP, Linear, fan_in, named
from vl_jax.params import Leaf


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
        c = self.config
        logits = router_logits(x, *self._router(x.shape[-1]))
        context = context.replace(x=x)  # pyright: ignore[reportAttributeAccessIssue]
        if self.has_rng("routing"):
            keys = noise.group_keys(self.make_rng("routing"), context)
            context = context.replace(rng=keys)  # pyright: ignore[reportAttributeAccessIssue]
        assignment, losses = routing.route(logits, context, state, c)
        self.sow("intermediates", "logits", logits)
        self.sow("intermediates", "scores", routing.probabilities(logits, context, c))
        self.sow("intermediates", "assignment", assignment)
        self.sow("intermediates", "valid", context.valid)
        self.sow("intermediates", "modality", context.modality)
        weights = jax.tree.map(lambda w: w.astype(x.dtype), self._experts(x.shape[-1]))
        y, stats = sparse_mlp(x, logits, assignment, weights, context=context, config=c)
        self.sow("intermediates", "routed", y)
        if c.shared_width:
            shared = GatedMLP(c.shared_width, c.activation, name="shared")(x)
            if c.shared.gate:
                gate = Linear(1, ("embed", None), name="shared_gate")(x)
                shared = jax.nn.sigmoid(gate) * shared
            y = y + shared
        return y, MoEOutput(stats=stats, losses=losses)

    def _router(self, width: int) -> tuple[jax.Array, jax.Array | None]:
        columns = routing.scheme_of(self.config).columns(self.config)
        kernel = self.param("router", named(fan_in(), "embed", None, decay=True), (width, columns))
        if not self.config.router_bias:
            return kernel, None
        return kernel, self.param("router_bias", named(nn.initializers.zeros, None), (kernel.shape[1],))

    def _experts(self, width: int) -> ExpertWeights:
        c, zeros = self.config, nn.initializers.zeros
        experts, inputs, hidden = c.num_experts, c.activation.inputs, c.expert_dim
        init = fan_in(in_axis=1, batch_axis=(0,))
        init_in = named(init, "experts", "embed", None, "mlp", inputs=(1,), outputs=(3,))
        w_in = self.param("w_in", init_in, (experts, width, inputs, hidden))
        init_out = named(init, "experts", "mlp", "embed", inputs=(1,), outputs=(2,))
        w_out = self.param("w_out", init_out, (experts, hidden, width))
        if not c.expert_bias:
            return ExpertWeights(w_in, w_out)
        b_in = self.param("b_in", named(zeros, "experts", None, "mlp"), (experts, inputs, hidden))
        return ExpertWeights(
            w_in, w_out, b_in, self.param("b_out", named(zeros, "experts", None), (experts, width))
        )


def router_logits(
    x: Float[Array, "B T D"], router: Float[Array, "D N"], bias: Float[Array, " N"] | None
) -> Float[Array, "B T N"]:
    """The logits of every token, in float32 whatever the dtype of ``x``."""
    x, router = x.astype(jnp.float32), router.astype(jnp.float32)
    logits = jnp.einsum("BTD,DN->BTN", x, router, precision=jax.lax.Precision.HIGHEST)
    return logits if bias is None else logits + bias.astype(jnp.float32)


def sparse_mlp(
    x: Float[Array, "B T D"],
    logits: Float[Array, "B T N"],
    assignment: routing.Assignment,
    weights: ExpertWeights,
    *,
    context: RoutingContext,
    config: MoEConfig,
) -> tuple[Float[Array, "B T D"], RoutingStats]:
    """The routed experts as a pure function; every row of the batch is one routing group."""
    kept, dropped = dispatch.apply_capacity(assignment, context.valid, config)
    stats = statistics(logits, assignment, dropped, context=context, config=config)
    y = exchange.apply_experts(x, kept, weights, config)
    if isinstance(assignment, Merge):  # no weight of its own keeps padding out
        y = jnp.where(context.valid[..., None], y, 0)
    return y, jax.lax.stop_gradient(stats)


def statistics(
    logits: Float[Array, "B T N"],
    assignment: routing.Assignment,
    dropped: Bool[Array, "B T K"],
    *,
    context: RoutingContext,
    config: MoEConfig,
) -> RoutingStats:
    """What a layer counts, and what its scheme measures, summed over groups."""
    scheme, measured = routing.scheme_of(config), {}
    if scheme.measure is not None:
        by_group = jax.vmap(lambda z, where: scheme.measure(z, where, config))(logits, context)  # pyright: ignore
        measured = jax.tree.map(lambda a: jnp.sum(a, axis=0), by_group)
    scores = routing.probabilities(logits, context, config)
    return balance.count(assignment, dropped, scores, context, measured)
