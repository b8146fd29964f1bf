"""The mixture-of-experts layer: router -> assignment -> capacity -> experts (+ shared), and statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.moe import balance, dispatch, figures, noise, routing, simple
from vl_jax.moe.assignment import Merge, by_group
from vl_jax.moe.routing import MoEConfig, RoutingContext, RoutingStats, State
from vl_jax.moe.varied import widths
from vl_jax.nn.layers import GatedMLP, Linear, fan_in, named
from vl_jax.params import Leaf

OWN = "scheme"  # where a layer keeps the parameters of its scheme
ROUTER = ("router", "router_bias", OWN)  # all of its parameters that decide, as far as it has them


@struct.dataclass
class MoEOutput:
    """What a sparse layer returns besides its output."""

    stats: RoutingStats
    losses: Leaf  # dict of scalars, already weighted
    logits: Leaf | None = (
        None  # [B T N], for a scheme that reads those of the layer before; see ``handed_on``
    )


def of_layer(
    context: RoutingContext, previous: jax.Array | None, layer: jax.Array | int, depth: int
) -> RoutingContext:
    """The context of one layer.

    Args:
      previous: what ``handed_on`` gave for the sparse layer before.
      layer: its number among the ``depth`` layers of its stack.
    """
    return context.replace(  # pyright: ignore[reportAttributeAccessIssue]
        previous=previous, layer=layer, depth=depth
    )


def first_logits(config: MoEConfig | None, tokens: tuple[int, ...]) -> jax.Array | None:
    """What the first sparse layer finds as the logits of the one before: zeros; None: nobody asks for them.

    Args:
      tokens: the shape [B T] of the tokens.
    """
    scheme = None if config is None else routing.scheme_of(config)
    if config is None or scheme is None or not scheme.previous:
        return None
    return jnp.zeros((*tokens, scheme.columns(config)), jnp.float32)


def logits_before(config: MoEConfig, previous: jax.Array | None, tokens: tuple[int, ...]) -> jax.Array | None:
    """What a sparse layer finds of the one before: zeros if that has other columns, or gives none."""
    zeros = first_logits(config, tokens)
    fits = zeros is not None and previous is not None and previous.shape == zeros.shape
    return previous if fits else zeros


Carried = jax.Array | tuple[jax.Array, jax.Array]


def carry(x: Float[Array, "B T D"], previous: Float[Array, "B T N"] | None) -> Carried:
    """What a layer of a loop gives the next one: x, with the logits of the last router if somebody asks."""
    return x if previous is None else (x, previous)


def carried_apart(carried: Carried) -> tuple[jax.Array, jax.Array | None]:
    """x [B T D] and the router logits, if there are any."""
    return carried if isinstance(carried, tuple) else (carried, None)


def handed_on(output: MoEOutput) -> tuple[jax.Array | None, MoEOutput]:
    """(the logits for the next sparse layer if its scheme asks for them, what is kept of this one)."""
    return output.logits, output.replace(logits=None)  # pyright: ignore[reportAttributeAccessIssue]


class DynamicMoE(nn.Module):
    """Routed experts by the configured scheme, plus shared experts that every token takes."""

    config: MoEConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: RoutingContext, state: State
    ) -> tuple[Float[Array, "B T D"], MoEOutput]:
        c = self.config
        keys = noise.group_keys(self.make_rng("routing"), context) if self.has_rng("routing") else None
        params = self._router(x.shape[-1])
        context = completed(context, x, params, c, keys=keys)
        logits = logits_of(x, params, context, c)
        assignment, losses = routing.route(logits, context, state, c)
        self.sow("intermediates", "logits", logits)
        self.sow("intermediates", "scores", routing.probabilities(logits, context, c))
        self.sow("intermediates", "assignment", assignment)
        self.sow("intermediates", "valid", context.valid)
        self.sow("intermediates", "modality", context.modality)
        weights = jax.tree.map(lambda w: w.astype(x.dtype), self._experts(x.shape[-1]))
        y, stats = sparse_mlp(x, logits, assignment, weights, context=context, config=c)
        told = jax.lax.stop_gradient(figures.of_losses(losses, context.valid))
        stats = stats.replace(figures={**stats.figures, **told})  # pyright: ignore[reportAttributeAccessIssue]
        if c.simple.num:
            y = y + simple.SimpleExperts(c, name="simple")(x, assignment)
        self.sow("intermediates", "routed", y)
        if c.shared_width:
            shared = GatedMLP(c.shared_width, c.activation, name="shared")(x)
            if c.shared.gate:
                gate = Linear(1, ("embed", None), name="shared_gate")(x)
                shared = jax.nn.sigmoid(gate) * shared
            y = y + shared
        wanted = logits if routing.scheme_of(c).previous else None
        return y, MoEOutput(stats=stats, losses=losses, logits=wanted)

    def _router(self, width: int) -> dict[str, Any]:
        """The parameters of the linear router, unless the scheme has logits of its own, and the scheme's."""
        scheme, result = routing.scheme_of(self.config), {}
        columns = scheme.columns(self.config)
        if scheme.logits is None:
            init = named(fan_in(), "embed", None, decay=True)
            result["router"] = self.param("router", init, (width, columns))
            if self.config.router_bias:
                zeros = named(nn.initializers.zeros, None)
                result["router_bias"] = self.param("router_bias", zeros, (columns,))
        if scheme.params(width, self.config):
            result[OWN] = SchemeParams(self.config, width, name=OWN)()
        return result

    def _experts(self, width: int) -> ExpertWeights | tuple[ExpertWeights, ...]:
        """The matrices of the routed experts; where these differ in width, those of every part of them."""
        matrices = simple.of_matrices(self.config)
        parts = zip(widths.parts_of(matrices), widths.names_of(matrices), strict=True)
        found = tuple(self._part(width, part.num_experts, part.expert_dim, name) for part, name in parts)
        return found if matrices.widths else found[0]

    def _part(self, width: int, experts: int, hidden: int, name: str) -> ExpertWeights:
        c, zeros, inputs = self.config, nn.initializers.zeros, self.config.activation.inputs
        init = fan_in(in_axis=1, batch_axis=(0,))
        init_in = named(init, "experts", "embed", None, "mlp", inputs=(1,), outputs=(3,))
        w_in = self.param(f"w_in{name}", init_in, (experts, width, inputs, hidden))
        init_out = named(init, "experts", "mlp", "embed", inputs=(1,), outputs=(2,))
        w_out = self.param(f"w_out{name}", init_out, (experts, hidden, width))
        if not c.expert_bias:
            return ExpertWeights(w_in, w_out)
        b_in = self.param(f"b_in{name}", named(zeros, "experts", None, "mlp"), (experts, inputs, hidden))
        b_out = self.param(f"b_out{name}", named(zeros, "experts", None), (experts, width))
        return ExpertWeights(w_in, w_out, b_in, b_out)


class SchemeParams(nn.Module):
    """The parameters of a scheme's own, by name."""

    config: MoEConfig
    width: int  # of the model

    @nn.compact
    def __call__(self) -> dict[str, jax.Array]:
        wanted = routing.scheme_of(self.config).params(self.width, self.config)
        return {
            name: self.param(name, named(p.begin, *p.names, decay=p.decay), p.shape)
            for name, p in wanted.items()
        }


def completed(
    context: RoutingContext,
    x: Float[Array, "B T D"],
    params: Mapping[str, Any],
    config: MoEConfig,
    *,
    keys: jax.Array | None = None,
) -> RoutingContext:
    """The context with what the layer knows: its input, its scheme's parameters, keys, which layer it is.

    Args:
      params: of the router, as ``logits_of`` takes them.
    """
    scheme, previous = routing.scheme_of(config), None
    if scheme.previous:
        shape = (*x.shape[:2], scheme.columns(config))
        previous = jnp.zeros(shape, jnp.float32) if context.previous is None else context.previous
    own = {name: value.astype(jnp.float32) for name, value in params.get(OWN, {}).items()}
    return context.replace(  # pyright: ignore[reportAttributeAccessIssue]
        x=x,
        rng=keys,
        params=own,
        previous=previous,
        layer=jnp.int32(0) if context.layer is None else context.layer,
    )


def logits_of(
    x: Float[Array, "B T D"], params: Mapping[str, Any], context: RoutingContext, config: MoEConfig
) -> Float[Array, "B T N"]:
    """The logits of every token: those of the linear router, or the scheme's own.

    Args:
      params: ``router`` and, with a bias, ``router_bias``; ``OWN`` are the scheme's.
      context: as ``completed`` returns it.

    Raises:
      ValueError: the scheme's own logits have another shape.
    """
    own = routing.scheme_of(config).logits
    if own is None:
        return router_logits(x, params["router"], params.get("router_bias"))
    logits = by_group(lambda x, where: own(x, where, config), x.astype(jnp.float32), context)
    expected = (*x.shape[:2], routing.scheme_of(config).columns(config))
    if logits.shape != expected:
        raise ValueError(
            f"scheme={config.scheme!r}: Scheme.logits gave {list(logits.shape[1:])} for a group, expected "
            f"{list(expected[1:])}: tokens, and as many columns as Scheme.columns says"
        )
    return logits.astype(jnp.float32)


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
    weights: ExpertWeights | tuple[ExpertWeights, ...],
    *,
    context: RoutingContext,
    config: MoEConfig,
) -> tuple[Float[Array, "B T D"], RoutingStats]:
    """The routed experts as a pure function; every row of the batch is one routing group."""
    matrices = simple.of_matrices(config)
    own = simple.chosen_matrices(assignment, config)
    kept, dropped = dispatch.apply_capacity(own, context.valid, matrices)
    stats = statistics(logits, assignment, dropped, context=context, config=config)
    y = widths.apply_experts(x, kept, weights, matrices)
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
        measure = scheme.measure
        found = by_group(lambda z, where: measure(z, where, config), logits, context)
        measured = jax.tree.map(lambda a: jnp.sum(a, axis=0), found)
    scores = routing.probabilities(logits, context, config)
    found = balance.count(assignment, dropped, scores, context, measured)
    return found.replace(  # pyright: ignore[reportAttributeAccessIssue]
        figures=figures.count(assignment, dropped, scores, context)
    )
