"""Load statistics of routing: counting them, and the figures read off them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from vl_jax.batch import MODALITIES
from vl_jax.moe.assignment import Assignment, ExpertChoice, Merge, RoutingContext, RoutingStats, Soft

RUNNING_DECAY = 0.99  # of what a step counts for in the running load: its mean age is a hundred steps


def count(
    assignment: Assignment,
    dropped: Bool[Array, "G T K"],
    scores: Float[Array, "G T E"],
    context: RoutingContext,
    measured: dict[str, jax.Array] | None = None,
) -> RoutingStats:
    """Counts one layer's choices by modality and expert.

    Without choices, a slot of ``Soft`` counts for the modality that fills most of it, and the tokens of a
    group with ``Merge`` for the expert that weighs most.

    Args:
      assignment: what the scheme decided, with a leading group axis, before capacity.
      dropped: choices that found no slot.
      scores: probabilities of the experts, for the importance.
      measured: what the scheme itself measured, summed over groups.
    """
    num_experts = scores.shape[-1]
    destinations, valid = None, context.valid[..., None]
    of_modality = context.modality[..., None] == jnp.arange(len(MODALITIES))
    of_modality = (of_modality & valid).astype(jnp.int32)  # [G T M]
    if isinstance(assignment, ExpertChoice):
        taken = (assignment.gates > 0).astype(jnp.int32)
        modality = jax.vmap(lambda table, tokens: table[tokens])(of_modality, assignment.tokens)
        load = jnp.einsum("GECM,GEC->ME", modality, taken)
    elif isinstance(assignment, Soft):
        filled = jnp.einsum("GTM,GTES->GESM", of_modality.astype(jnp.float32), assignment.dispatch)
        most = jax.nn.one_hot(jnp.argmax(filled, axis=-1), len(MODALITIES), dtype=jnp.int32)
        load = jnp.einsum("GESM,G->ME", most, jnp.any(context.valid, axis=1).astype(jnp.int32))
    elif isinstance(assignment, Merge):
        heaviest = jax.nn.one_hot(jnp.argmax(assignment.weights, axis=-1), num_experts, dtype=jnp.int32)
        load = jnp.einsum("GTM,GE->ME", of_modality, heaviest)
    else:
        chosen = jax.nn.one_hot(assignment.experts, num_experts, dtype=jnp.int32).sum(axis=2)
        load = jnp.einsum("GTM,GTE->ME", of_modality, chosen)
        destinations = jnp.stack([_destinations(chosen, n) for n in fan_out_shards(num_experts)])
    return RoutingStats(
        load=load,
        importance=jnp.einsum("GTM,GTE->ME", of_modality.astype(jnp.float32), scores),
        tokens=jnp.sum(of_modality, axis=(0, 1)),
        dropped=jnp.einsum("GTM,GTK->M", of_modality, dropped.astype(jnp.int32)),
        measured=measured or {},
        destinations=destinations,
    )


def fan_out_shards(num_experts: int) -> tuple[int, ...]:
    """The numbers of equal shards that ``RoutingStats.destinations`` are counted for."""
    return tuple(n for n in (1, 2, 4, 8, 16, 32, 64) if num_experts % n == 0)


def _destinations(chosen: Int[Array, "G T E"], shards: int) -> Int[Array, ""]:
    """The number of pairs of a token and a shard that holds an expert it chose."""
    of_shard = chosen.reshape(*chosen.shape[:-1], shards, -1).sum(axis=-1)
    return jnp.sum(of_shard > 0, dtype=jnp.int32)


def pooled_loss(
    logits: Float[Array, "*L T E"], valid: Bool[Array, "*L T"], *, top_k: int
) -> Float[Array, ""]:
    """The balance loss of Mixtral: layers are pooled before load and probability are multiplied.

    ``E * sum_e f_e P_e`` with f_e the choices of e per token (all K of them, so that perfect balance gives
    K) and P_e its mean softmax probability, over the valid tokens of all layers.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    num_experts = logits.shape[-1]
    experts = jax.lax.top_k(probabilities, top_k)[1]
    mask = valid[..., None].astype(jnp.float32)
    chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.float32).sum(axis=-2)
    load, probability = ((v * mask).reshape(-1, num_experts).sum(axis=0) for v in (chosen, probabilities))
    return num_experts * jnp.sum(load * probability) / jnp.sum(mask) ** 2


def sequence_losses(
    logits: Float[Array, "L B T E"], valid: Bool[Array, "B T"]
) -> dict[str, Float[Array, ""]]:
    """The losses of the Switch Transformer's routers (arXiv 2101.03961, eq. 4-6) and their z-loss.

    ``balance`` is ``E * sum_e f_e P_e`` of every row, layers pooled, then the mean over rows: f_e is the
    share of the row's tokens whose best expert is e, slot or no slot, and P_e its mean probability. ``z`` is
    the mean square of the logits' logsumexp (arXiv 2202.08906, eq. 5). Both are over valid tokens.
    """
    valid = jnp.broadcast_to(valid, logits.shape[:-1])
    by_row = jax.vmap(functools.partial(pooled_loss, top_k=1), in_axes=1)(logits, valid)
    squared = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1) ** 2
    return {"balance": jnp.mean(by_row), "z": jnp.mean(squared, where=valid)}


def max_violation(load: Num[Array, "*L E"]) -> Float[Array, "*L"]:
    """MaxVio: largest load over mean load, minus one (arXiv 2408.15664, eq. 4). 0 is perfect balance."""
    load = load.astype(jnp.float32)
    return jnp.max(load, axis=-1) / jnp.maximum(jnp.mean(load, axis=-1), 1e-9) - 1.0


def running_load(before: Float[Array, "L E"], stats: RoutingStats) -> Float[Array, "L E"]:
    """Shares of load summed over the steps so far, older ones ever less; from zeros at the beginning.

    The load of one step says little about single experts when tokens are few; that of many steps has their
    chance averaged out. MaxVio is the same for any multiple, so the sum needs no divisor.
    """
    load = jnp.sum(stats.load, axis=-2).astype(jnp.float32)
    share = load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1.0)
    return RUNNING_DECAY * before + share


def dead_experts(load: Int[Array, "*L E"]) -> Int[Array, "*L"]:
    """The number of experts that no token chose."""
    return jnp.sum(load == 0, axis=-1)


def summarize(stats: RoutingStats) -> dict[str, jax.Array]:
    """Figures per layer from statistics stacked over layers [L ...]; load as shares within each modality.

    Fan-out [L S] is the mean number of shards that a token is sent to, for each of ``fan_out_shards``.
    """
    total = jnp.sum(stats.load, axis=-2)
    load = stats.load.astype(jnp.float32)
    share = load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1.0)
    choices = jnp.maximum(jnp.sum(load, axis=(-1, -2)), 1.0)
    fan_out = {}
    if stats.destinations is not None:
        tokens = jnp.maximum(jnp.sum(stats.tokens, axis=-1, keepdims=True), 1)
        fan_out["fan_out"] = stats.destinations.astype(jnp.float32) / tokens.astype(jnp.float32)
    return {
        **fan_out,
        "load": share,
        "maxvio": max_violation(total),
        "dead": dead_experts(total),
        "drop_rate": jnp.sum(stats.dropped, axis=-1).astype(jnp.float32) / choices,
    }
