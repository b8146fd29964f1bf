"""Expert parallelism in bounded rooms: a token travels once to every shard it has experts on, and back.

    tokens of a chunk --sort by shard--> [S D] --ragged all-to-all--> [R D] --its experts there, by gate-->
      --ragged all-to-all--> [S D] --sum of a token's rows--> tokens of the chunk

Nothing is dropped, and nothing is as large as all shards together. First counts are exchanged, so every
shard knows the queue of rows that want to come to it, and every sender the place of its own rows in it. There
is room for S rows to leave and R to arrive at a time (``rooms``): a chunk ends where S is full, and what is
behind the first R rows of a queue comes in another round. All shards go on until none has anything left.

With several hops a token goes once to every slice it has experts on, and from there to its devices: what the
first hop leads to is the second. With several chunks, the rows of the next one arrive while experts work.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from vl_jax.kernels import target
from vl_jax.kernels.activation import Activation
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.moe.assignment import TokenChoice
from vl_jax.moe.bounded import windows
from vl_jax.moe.bounded.rooms import Rooms, Traffic, plan
from vl_jax.params import Leaf


@dataclasses.dataclass(frozen=True)
class Hop:
    """One exchange along a mesh axis, and what is done where it leads."""

    rooms: Rooms
    axis: str
    groups: tuple[tuple[int, ...], ...] | None  # of the devices on the axis that exchange; None: all of them
    after: Hop | windows.Experts  # the next hop, or the experts
    overlapped: bool  # whether the next rows arrive while these are worked on

    @property
    def kernel(self) -> str:
        """What rows are summed by."""
        return self.after.kernel

    @property
    def options(self) -> dict[str, Any]:
        """Which devices a collective joins."""
        groups = None if self.groups is None else [list(group) for group in self.groups]
        return {"axis_name": self.axis, "axis_index_groups": groups}


@struct.dataclass
class NextRound:
    """What the next round is about; ``active`` is the same on all devices."""

    first: Leaf  # i32 token of this device that the chunk begins with
    turn: Leaf  # i32 which of the rounds of this chunk
    active: Leaf  # bool


@struct.dataclass
class Chunk:
    """The rows of some tokens in the order of their shards."""

    start: Leaf  # i32 token that the slice of tokens begins with
    last: Leaf  # i32 token after the last one
    experts: Leaf  # i32[C K] of the slice; N times the experts of a shard for unused choices
    used: Leaf  # bool[C K]
    choice: Leaf  # i32[S] index c * K + k of the first choice that a row is for
    row: Leaf  # i32[C K] the row that begins with a choice; S for those that begin none
    ends: Leaf  # i32[N] of the rows of every shard


@struct.dataclass
class Passage:
    """What moves in one round, as this device knows it; i32[N] each."""

    away: Leaf  # first row for shard j, among those that this one sends
    sizes: Leaf  # rows for shard j
    there: Leaf  # where they begin there
    here: Leaf  # where the rows from shard i begin here
    arriving: Leaf  # rows from shard i
    away_there: Leaf  # where they begin among those that i sends


@struct.dataclass
class Arrival:
    """Rows that have come, and the way back."""

    chunk: Chunk
    passage: Passage
    rows: Any  # [R D] of every array that was sent
    experts: Leaf  # i32[R L] of this shard, sorted; its number of experts for unused choices
    gates: Leaf  # f32[R L]
    active: Leaf  # bool
    following: NextRound


def apply_experts(
    x: Float[Array, "G T D"],
    assignment: TokenChoice,
    weights: ExpertWeights,
    *,
    activation: Activation,
    kernel: str,
    traffic: Traffic,
    axis: str = "expert",
) -> Float[Array, "G T D"]:
    """The experts on all shards of a mesh axis, to be called inside ``shard_map``.

    Args:
      x: this shard's tokens.
      assignment: their choices, by the numbers of all experts.
      weights: this shard's experts.
      traffic: what rooms are planned for.
    """
    experts, gates = windows.by_expert(assignment, traffic.num_experts)
    hop = route(traffic, activation=activation, kernel=kernel, axis=axis)
    y: Any = travel(hop, x.reshape(-1, x.shape[-1]), experts, gates, weights)
    return y.reshape(x.shape)


def route(traffic: Traffic, *, activation: Activation, kernel: str, axis: str) -> Hop:
    """The hops of an exchange. A slice is made of neighbours on the axis."""
    rooms = plan(traffic)
    experts = windows.Experts(activation, kernel, rooms[-1].pairs)
    overlapped = traffic.num_chunks > 1
    if len(rooms) == 1:
        return Hop(rooms[0], axis, None, experts, overlapped)
    slices, devices = rooms[0].shards, rooms[1].shards
    within = tuple(tuple(s * devices + d for d in range(devices)) for s in range(slices))
    between = tuple(tuple(s * devices + d for s in range(slices)) for d in range(devices))
    return Hop(rooms[0], axis, between, Hop(rooms[1], axis, within, experts, False), overlapped)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def travel(
    hop: Hop,
    x: Float[Array, "T D"],
    experts: Int[Array, "T K"],
    gates: Float[Array, "T K"],
    weights: ExpertWeights,
) -> Float[Array, "T D"]:
    """Round after round; choices as ``windows.by_expert`` sorts them."""

    def one(arrival: Arrival, y: jax.Array) -> jax.Array:
        out = _compute(hop, arrival, arrival.rows[0], arrival.gates, weights)
        return _add(y, hop, arrival.chunk, _return(hop, arrival, out))

    return _each_round(hop, (x,), experts, gates, one, jnp.zeros_like(x))


def _forward(hop: Hop, *arguments: Any) -> tuple[jax.Array, tuple]:
    return travel(hop, *arguments), arguments


def _backward(hop: Hop, residual: tuple, grad: jax.Array) -> tuple:
    """Rows travel again beside their gradients, so that nothing is kept from the forward pass."""
    x, experts, gates, weights = residual

    def one(arrival: Arrival, sums: tuple) -> tuple:
        rows, upstream = arrival.rows
        _, pull = jax.vjp(functools.partial(_compute, hop, arrival), rows, arrival.gates, weights)
        of_rows, of_gates, of_weights = pull(upstream)
        grad_x, grad_gates, grad_weights = sums
        return (
            _add(grad_x, hop, arrival.chunk, _return(hop, arrival, of_rows)),
            _add_gates(grad_gates, hop, arrival.chunk, _return(hop, arrival, of_gates)),
            jax.tree.map(lambda total, part: total + part.astype(total.dtype), grad_weights, of_weights),
        )

    sums = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    begun = (jnp.zeros_like(x), jnp.zeros_like(gates), sums)
    grad_x, grad_gates, sums = _each_round(hop, (x, grad), experts, gates, one, begun)
    return grad_x, None, grad_gates, jax.tree.map(lambda total, w: total.astype(w.dtype), sums, weights)


travel.defvjp(_forward, _backward)


def _each_round(hop: Hop, sent: tuple, experts: jax.Array, gates: jax.Array, one: Any, begun: Any) -> Any:
    """``one(arrival, carry) -> carry`` until no device has anything left."""
    fetch = functools.partial(_fetch, hop, sent, experts, gates)
    zero = jnp.zeros((), jnp.int32)
    start = NextRound(zero, zero, jnp.ones((), bool))
    if hop.overlapped:  # the rows of the next round do not wait for what is done with these
        return jax.lax.while_loop(
            lambda carry: carry[0].active,
            lambda carry: (fetch(carry[0].following), one(*carry)),
            (fetch(start), begun),
        )[1]

    def round_of(carry: tuple[NextRound, Any]) -> tuple[NextRound, Any]:
        arrival = fetch(carry[0])
        return arrival.following, one(arrival, carry[1])

    return jax.lax.while_loop(lambda carry: carry[0].active, round_of, (start, begun))[1]


def _fetch(hop: Hop, sent: tuple, experts: jax.Array, gates: jax.Array, at: NextRound) -> Arrival:
    """Sends what is next, and receives."""
    rooms, tokens = hop.rooms, experts.shape[0]
    chunk = _chunk(hop, experts, at.first)
    passage, waiting = _agree(hop, chunk, at.turn)
    token = chunk.choice // experts.shape[1]
    rows = tuple(_send(hop, _slice(array, chunk, rooms.tokens)[token], passage) for array in sent)
    ids, row_gates = _choices(hop, chunk, _slice(gates, chunk, rooms.tokens))
    mail = jnp.concatenate([ids, jax.lax.bitcast_convert_type(row_gates, jnp.int32)], axis=1)
    mail = _send(hop, mail, passage)
    ids, row_gates = jnp.split(mail, 2, axis=1)
    left = jnp.stack([waiting - (at.turn + 1) * rooms.received, tokens - chunk.last])
    left = jax.lax.pmax(left, hop.axis) > 0  # on any device
    following = NextRound(
        first=jnp.where(left[0], at.first, chunk.last),
        turn=jnp.where(left[0], at.turn + 1, 0),
        active=jnp.any(left),
    )
    return Arrival(
        chunk,
        passage,
        rows,
        jnp.where(ids > 0, ids - 1, rooms.experts),
        jax.lax.bitcast_convert_type(row_gates, jnp.float32),
        at.active,
        following,
    )


def _chunk(hop: Hop, experts: Int[Array, "T K"], first: jax.Array) -> Chunk:
    """From a token on, as many as have room to be sent together."""
    rooms, unused = hop.rooms, hop.rooms.shards * hop.rooms.experts
    heads = _heads(experts, rooms)
    last = windows.last_within(first, jnp.sum(heads, axis=1, dtype=jnp.int32), rooms.sent)
    start = jnp.minimum(first, experts.shape[0] - rooms.tokens)
    last = jnp.minimum(last, first + rooms.tokens)
    token = start + jnp.arange(rooms.tokens, dtype=jnp.int32)[:, None]
    here = (token >= first) & (token < last)
    mine = jnp.where(here, jax.lax.dynamic_slice_in_dim(experts, start, rooms.tokens), unused)
    heads = _heads(mine, rooms)
    key = jnp.where(heads, mine // rooms.experts, rooms.shards)
    choice, row, ends = windows.sort(key.reshape(-1), rooms.shards, rooms.sent)
    return Chunk(start, last, mine, mine < unused, choice, row.reshape(mine.shape), ends)


def _heads(experts: Int[Array, "T K"], rooms: Rooms) -> jax.Array:
    """Whether a row begins with a choice: the first of its shard, and every Lth after it."""
    return (_behind(experts, rooms) % _width(experts, rooms) == 0) & (experts < rooms.shards * rooms.experts)


def _behind(experts: Int[Array, "T K"], rooms: Rooms) -> Int[Array, "T K"]:
    """How many choices of the same token and shard come before each."""
    shard, k = experts // rooms.experts, jnp.arange(experts.shape[1], dtype=jnp.int32)
    new = jnp.pad(shard[:, 1:] != shard[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return k - jax.lax.cummax(jnp.where(new, k, 0), axis=1)


def _width(experts: Int[Array, "_ K"], rooms: Rooms) -> int:
    """The most choices L that go with a row."""
    return min(experts.shape[1], rooms.experts)


def _agree(hop: Hop, chunk: Chunk, turn: jax.Array) -> tuple[Passage, jax.Array]:
    """Exchanges counts; what moves in this round, and how many rows the queue here has."""
    first = jnp.pad(chunk.ends[:-1], (1, 0))
    mine = jnp.stack([chunk.ends - first, first], axis=1)
    theirs = jax.lax.all_to_all(mine, split_axis=0, concat_axis=0, tiled=True, **hop.options)
    counts, arriving = mine[:, 0], theirs[:, 0]
    queue = jnp.cumsum(arriving, dtype=jnp.int32) - arriving
    place = jax.lax.all_to_all(queue, split_axis=0, concat_axis=0, tiled=True, **hop.options)
    room = hop.rooms.received

    def cut(place: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of rows that stand at ``place`` in a queue: those before this round, in it, and where they go."""
        before = jnp.clip(turn * room - place, 0, counts)
        until = jnp.clip((turn + 1) * room - place, 0, counts)
        return before, until - before, jnp.clip(place + before - turn * room, 0, room)

    before, sizes, there = cut(place, counts)
    before_here, arriving_now, here = cut(queue, arriving)
    passage = Passage(first + before, sizes, there, here, arriving_now, theirs[:, 1] + before_here)
    return passage, jnp.sum(arriving)


def _choices(hop: Hop, chunk: Chunk, gates: jax.Array) -> tuple[Int[Array, "S L"], Float[Array, "S L"]]:
    """What a row is for: the experts of its shard, counted from 1 (0: unused), and their gates."""
    rooms, top_k = hop.rooms, chunk.experts.shape[1]
    offset = jnp.arange(_width(chunk.experts, rooms), dtype=jnp.int32)
    token, k = chunk.choice[:, None] // top_k, chunk.choice[:, None] % top_k + offset
    inside, k = k < top_k, jnp.minimum(k, top_k - 1)
    experts = chunk.experts[token, k]
    shard = experts[:, :1] // rooms.experts
    local = experts - shard * rooms.experts
    same = inside & (local < rooms.experts) & (shard < rooms.shards)
    return jnp.where(same, local + 1, 0), jnp.where(same, gates[token, k], 0.0)


def _compute(hop: Hop, arrival: Arrival, rows: jax.Array, gates: jax.Array, weights: Any) -> jax.Array:
    """The next hop of the rows that came, or their experts."""
    if isinstance(hop.after, Hop):
        return travel(hop.after, rows, arrival.experts, gates, weights)
    if hop.rooms.experts > 1:
        return windows.walk(hop.after, rows, arrival.experts, gates, weights)
    count = jnp.sum(arrival.passage.arriving, dtype=jnp.int32)[None]
    return hop.after.products(rows, count, gates[:, 0], weights)


def _slice(array: jax.Array, chunk: Chunk, tokens: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, chunk.start, tokens)


def _add(
    total: Float[Array, "T D"], hop: Hop, chunk: Chunk, rows: Float[Array, "S D"]
) -> Float[Array, "T D"]:
    """Adds the rows that came back to their tokens."""
    part = windows.sum_rows(rows, chunk.row, chunk.used, hop.kernel)
    part += _slice(total, chunk, part.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(total, part, chunk.start, axis=0)


def _add_gates(
    total: Float[Array, "T K"], hop: Hop, chunk: Chunk, rows: Float[Array, "S L"]
) -> Float[Array, "T K"]:
    """The same of the gradients of gates, each of which is in the row that its choice went with."""
    behind = _behind(chunk.experts, hop.rooms) % rows.shape[1]
    head = jnp.arange(chunk.row.shape[1], dtype=jnp.int32) - behind
    row = jnp.take_along_axis(chunk.row, head, axis=1)
    part = rows.at[row, behind].get(mode="fill", fill_value=0)
    part += _slice(total, chunk, part.shape[0])
    return jax.lax.dynamic_update_slice_in_dim(total, part, chunk.start, axis=0)


def _send(hop: Hop, rows: Float[Array, "S D"] | Int[Array, "S D"], passage: Passage) -> jax.Array:
    """Rows to the shards that they are for; rows of the result past those that come are zeros."""
    p = passage
    out = (p.away, p.sizes, p.there)
    return _move(hop, rows, hop.rooms.received, out, (p.away_there, p.arriving, p.here))


def _return(hop: Hop, arrival: Arrival, rows: Float[Array, "R D"]) -> Float[Array, "S D"]:
    """Rows back to where they came from, each to the place that it was sent from."""
    p = arrival.passage
    out = (p.here, p.arriving, p.away_there)
    return _move(hop, rows, hop.rooms.sent, out, (p.there, p.sizes, p.away))


def _move(hop: Hop, rows: jax.Array, size: int, out: tuple, come: tuple) -> jax.Array:
    """A ragged all-to-all; on a CPU, where XLA has none, the same rows are picked out of an all-gather.

    Args:
      size: rows of the result.
      out: for every shard, the first of its rows here, their number, and where they begin there.
      come: for every shard, the first of its rows for this one, their number, and where they begin here.
    """
    if target.current_kind() != "cpu":
        first, sizes, there = out
        empty = jnp.zeros((size, *rows.shape[1:]), rows.dtype)
        return jax.lax.ragged_all_to_all(rows, empty, first, sizes, there, come[1], **hop.options)
    first, sizes, here = come
    everything = jax.lax.all_gather(rows, **hop.options)
    row = jnp.arange(size, dtype=jnp.int32)
    source = jnp.maximum(jnp.searchsorted(here, row, side="right") - 1, 0)
    behind = row - here[source]
    found = everything.at[source, first[source] + behind].get(mode="clip")
    return jnp.where((behind >= 0)[:, None] & (behind < sizes[source])[:, None], found, 0)
