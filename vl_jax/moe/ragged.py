"""Expert parallelism without a capacity: a token travels once to every shard it has experts on, and back.

    x [T D] --sort by shard--> [S D] --ragged all-to-all--> [R D] --its experts there, summed by gate-->
      --ragged all-to-all--> [S D] --sum over shards--> [T D]

Nothing is dropped: a shard has room for every token of all shards. With a capacity it needs no more room than
its slots. Choices themselves go everywhere (a few bytes a token), so that every shard knows what will arrive.
On a CPU, where XLA has no such exchange, the same rows are picked out of an all-gather.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vl_jax.kernels import target
from vl_jax.kernels.activation import Activation
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.kernels.permute import Moves, permute, unpermute
from vl_jax.moe import dispatch
from vl_jax.moe.assignment import TokenChoice
from vl_jax.params import Leaf


@struct.dataclass
class Journey:
    """Where this shard's tokens go, and which tokens come; N shards with T tokens each."""

    moves: Moves  # between its tokens and the S rows it sends, by shard; ``inverse`` is [T N]
    counts: Leaf  # i32[N N] rows from shard i to shard j
    arriving: Leaf  # i32[R] the tokens that come, numbered over all shards; N*T for rows that stay empty


def apply_experts(
    x: Float[Array, "G T D"],
    assignment: TokenChoice,
    weights: ExpertWeights,
    *,
    activation: Activation,
    kernel: str,
    slots: int | None = None,
    axis: str = "expert",
) -> Float[Array, "G T D"]:
    """The experts on all shards of a mesh axis, to be called inside ``shard_map``.

    Args:
      x: this shard's tokens.
      assignment: their choices, by the numbers of all experts.
      weights: this shard's experts.
      slots: the most choices an expert has per group, if there is a capacity.
    """
    num_local, shards = weights.w_in.shape[0], jax.lax.axis_size(axis)
    top_k, tokens = assignment.experts.shape[-1], x.shape[0] * x.shape[1]
    everywhere = jax.tree.map(lambda a: jax.lax.all_gather(a, axis, tiled=True), assignment)
    mine: Any = dispatch.own_experts(everywhere, num_local, jax.lax.axis_index(axis))
    room = shards * tokens if slots is None else min(shards * tokens, num_local * slots * shards * x.shape[0])
    shard = assignment.experts.reshape(tokens, top_k, 1) // num_local
    journey = plan(
        jnp.any(shard == jnp.arange(shards), axis=1),
        jnp.any(mine.experts < num_local, axis=-1).reshape(-1),
        most_sent=tokens * min(top_k, shards),
        most_received=room,
        axis=axis,
    )
    rows: Any = permute(x.reshape(tokens, -1), journey.moves)
    rows = send(room, axis, rows, journey.counts)
    here = TokenChoice(
        _of_tokens(mine.experts, journey.arriving, num_local), _of_tokens(mine.gates, journey.arriving, 0.0)
    )
    rows = dispatch.apply_experts(rows[None], here, weights, activation=activation, kernel=kernel)[0]
    rows = send(tokens * min(top_k, shards), axis, rows, journey.counts.T)
    return unpermute(rows, journey.moves).reshape(x.shape)


def plan(
    wanted: Bool[Array, "T N"],
    arriving: Bool[Array, " all"],
    *,
    most_sent: int,
    most_received: int,
    axis: str,
) -> Journey:
    """The rows in order: those sent by shard, then token; those received by the shard they come from.

    Args:
      wanted: whether a token of this shard is to go to shard n.
      arriving: whether a token, of all shards, is to come here.
    """
    tokens, shards = wanted.shape
    by_shard = wanted.T.reshape(-1)
    place = jnp.where(by_shard, jnp.cumsum(by_shard, dtype=jnp.int32) - 1, most_sent)
    token = jnp.tile(jnp.arange(tokens, dtype=jnp.int32), shards)
    source = jnp.zeros((most_sent,), jnp.int32).at[place].set(token, mode="drop")
    counts = jax.lax.all_gather(jnp.sum(wanted, axis=0, dtype=jnp.int32), axis)
    slot = jnp.where(arriving, jnp.cumsum(arriving, dtype=jnp.int32) - 1, most_received)
    number = jnp.arange(arriving.size, dtype=jnp.int32)
    tokens_here = jnp.full((most_received,), arriving.size, jnp.int32).at[slot].set(number, mode="drop")
    return Journey(Moves(source, place.reshape(shards, tokens).T), counts, tokens_here)


def _of_tokens(values: jax.Array, tokens: jax.Array, empty: float) -> jax.Array:
    """[G T K] to the rows [1 R K] of the given tokens; ``empty`` in rows without one."""
    return values.reshape(-1, values.shape[-1]).at[tokens].get(mode="fill", fill_value=empty)[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def send(
    size: int, axis: str, rows: Float[Array, "S D"], counts: Int[Array, "N N"]
) -> Float[Array, "size D"]:
    """The first ``counts[me].sum()`` rows to the shards, in their order; the transpose sends them back.

    Args:
      size: of the result; rows past those that come are zeros.
      counts: rows from shard i to shard j, known to all.
    """
    me = jax.lax.axis_index(axis)
    first = jnp.cumsum(counts, axis=1) - counts  # [i j] of the rows for j, in what i sends
    place = jnp.cumsum(counts, axis=0) - counts  # [i j] of the rows from i, in what j receives
    if target.current_kind() != "cpu":
        out = jnp.zeros((size, rows.shape[1]), rows.dtype)
        return jax.lax.ragged_all_to_all(
            rows, out, first[me], counts[me], place[me], counts[:, me], axis_name=axis
        )
    everything = jax.lax.all_gather(rows, axis)
    row = jnp.arange(size, dtype=jnp.int32)
    ends = place[:, me] + counts[:, me]
    source = jnp.searchsorted(ends, row, side="right").astype(jnp.int32)
    index = (first - place)[source, me] + row
    return jnp.where((row < ends[-1])[:, None], everything.at[source, index].get(mode="clip"), 0)


def _send_forward(size: int, axis: str, rows: jax.Array, counts: jax.Array) -> tuple:
    return send(size, axis, rows, counts), (counts, rows[:, :0])


def _send_backward(size: int, axis: str, residual: tuple, grad: jax.Array) -> tuple[jax.Array, None]:
    counts, like = residual
    return send(like.shape[0], axis, grad, counts.T), None


send.defvjp(_send_forward, _send_backward)
