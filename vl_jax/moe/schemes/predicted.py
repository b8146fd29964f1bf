"""Experts choose the best tokens of a sample in training; afterwards a predictor says which they would take.

In training expert e takes the floor(share * n) tokens of highest score among the n of a sample. A small MLP
learns by the way, from inputs that pass no gradient on, whether a token is among them. In evaluation and
generation there is no sample to compare with: a token is taken where the MLP gives it more than even odds.

With one expert it is the router of a mixture of depths (arXiv 2404.02258, sections 3.2-3.5), see
``language.depths``; with several it is expert choice with auxiliary routers, as in MoMa (arXiv 2407.21770).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array, Bool, Float, Int

from vl_jax.moe import losses as losses_lib
from vl_jax.moe.assignment import Losses, RoutingContext, State, TokenChoice
from vl_jax.moe.routing import MoEConfig, Param, Scheme
from vl_jax.moe.slots import as_fraction, ceil_times


def params(width: int, config: MoEConfig) -> dict[str, Param]:
    """A linear router, and the predictor."""
    experts, hidden = config.num_experts, config.option("hidden")
    return {
        "router": Param((width, experts), ("embed", None)),
        "predict_in": Param((width, hidden), ("embed", None)),
        "predict_out": Param((hidden, experts), (None, None)),
        "predict_bias": Param((experts,), (None,), initializers.zeros, decay=False),
    }


def logits(x: Float[Array, "T D"], context: RoutingContext, config: MoEConfig) -> Float[Array, "T N"]:
    """Scores of the experts, then the predictor's log-odds for each."""
    p = context.params
    assert p is not None
    seen = jax.lax.stop_gradient(x)
    hidden = jax.nn.gelu(seen @ p["predict_in"])
    return jnp.concatenate([x @ p["router"], hidden @ p["predict_out"] + p["predict_bias"]], axis=-1)


def predicted_choice(
    logits: Float[Array, "T N"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """The best tokens of every sample in training; those that are predicted to be among them elsewhere."""
    experts = config.num_experts
    wanted, odds = logits[:, :experts], logits[:, experts:]
    open_to = jnp.broadcast_to(context.valid[:, None], wanted.shape)
    if context.excluded is not None:
        open_to = open_to & ~context.excluded
    losses = losses_lib.z_loss(wanted, context, config)
    if context.rng is None:
        chosen = open_to & (odds > 0)
    else:
        chosen = best_of_sample(wanted, open_to, context, share=config.option("share"))
        missed = jax.nn.softplus(jnp.where(chosen, -odds, odds))
        losses["predictor"] = config.option("weight") * jnp.mean(losses_lib.mean(missed, context.valid))
    ids = jnp.where(chosen, jnp.arange(experts, dtype=jnp.int32), experts)
    gates = jnp.where(chosen, jax.nn.sigmoid(wanted) * config.gates.scale, 0.0)
    return TokenChoice(ids, gates), losses


def best_of_sample(
    scores: Float[Array, "T E"], open_to: Bool[Array, "T E"], context: RoutingContext, *, share: float
) -> Bool[Array, "T E"]:
    """The floor(share * n) highest scores of every expert among the n valid tokens of a sample.

    Samples that are packed in a row are told apart by their positions, which begin at 0.
    """
    length = scores.shape[0]
    sample = jnp.zeros((length,), jnp.int32)
    if context.positions is not None:
        sample = jnp.cumsum(context.positions == 0, dtype=jnp.int32)
    counts = jax.ops.segment_sum(context.valid.astype(jnp.int32), sample, length + 1)[sample]
    wanted = most_of(counts, share, most=length)
    first = jnp.searchsorted(sample, sample).astype(jnp.int32)

    def ranks(values: Float[Array, " T"]) -> Int[Array, " T"]:
        order = jnp.lexsort((-values, sample))
        return jnp.zeros_like(first).at[order].set(jnp.arange(length, dtype=jnp.int32)) - first

    rank = jax.vmap(ranks, in_axes=1, out_axes=1)(jnp.where(open_to, scores, -jnp.inf))
    return open_to & (rank < wanted[:, None])


def most_of(count, share: float, *, most: int):
    """``floor(share * count)``, for an int or an array of them up to ``most``."""
    return count - ceil_times(count, 1 - as_fraction(share), most=most)


def _validate(config: MoEConfig) -> None:
    if not 0 < config.option("share") <= 1:
        raise ValueError(f"options.share={config.option('share')} must be above 0 and at most 1")
    if config.option("hidden") < 1:
        raise ValueError(f"options.hidden={config.option('hidden')} must be >= 1")
    if not config.is_dropless or config.gates.normalize:
        raise ValueError(
            f"limit and gates.normalize have no meaning for scheme={config.scheme!r}: options.share says how "
            "many tokens an expert takes, each by itself"
        )


PREDICTED_CHOICE = Scheme(
    predicted_choice,
    defaults={"share": 0.125, "hidden": 32, "weight": 0.1},
    columns=lambda config: 2 * config.num_experts,
    scores=lambda logits, config: jax.nn.sigmoid(logits[..., : config.num_experts]) / config.num_experts,
    params=params,
    logits=logits,
    most=lambda length, config: most_of(length, config.option("share"), most=length),
    validate=_validate,
    rng=True,
    foresees=True,
)
