"""The router: scores, biased choice of K experts, gates, and where every choice goes; one pass, no sort.

    logits [T E] --score--> + bias --top-k--> experts, gates [T K]
                                         '--> counts [E], rank [T K]: choice number rank of its expert

The first row of an expert is the sum of the counts before it; that plus the rank is where a stable sort by
expert puts the choice (``sort_by_expert``). The kernels walk over tiles of tokens with running counts, tokens
along the lanes, so that experts are compared for many tokens at once. ``rank_in_expert`` is the second half
alone, for choices that came from elsewhere.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from vl_jax.kernels.permute import Moves
from vl_jax.kernels.target import Target, current_target
from vl_jax.params import Leaf

Score = Literal["softmax", "sigmoid"]
TOKEN_TILE = 128


@struct.dataclass
class Routing:
    """The experts of every token. Expert id E means "unused"."""

    experts: Leaf  # i32[T K] best first; of equal ones the first
    gates: Leaf  # f32[T K] their scores, without the bias
    rank: Leaf  # i32[T K] how many earlier tokens chose the same expert; 0 where unused
    counts: Leaf  # i32[E]


def sort_by_expert(
    experts: Int[Array, "T K"], rank: Int[Array, "T K"], counts: Int[Array, " E"]
) -> tuple[Int[Array, " R"], Moves]:
    """Sorts the choices by expert, from their ranks: the choice t * K + k of every row, and the moves.

    R = T*K rows; the row of an unused choice is R, and rows past the used ones name choice 0.
    """
    first = jnp.cumsum(counts) - counts
    row = first.at[experts].get(mode="clip") + rank
    inverse = jnp.where(experts < counts.shape[0], row, experts.size)
    index = jnp.arange(experts.size, dtype=jnp.int32)
    choice = jnp.zeros_like(index).at[inverse.reshape(-1)].set(index, mode="drop")
    return choice, Moves(choice // experts.shape[1], inverse)


def route_top_k(
    logits: Float[Array, "T E"],
    *,
    top_k: int,
    score: Score = "softmax",
    bias: Float[Array, " E"] | None = None,
    valid: Bool[Array, " T"] | None = None,
    kernel: str = "reference",
    target: Target | None = None,
) -> Routing:
    """Chooses the ``top_k`` experts of highest ``score + bias``; differentiable through the gates.

    Args:
      bias: chooses, but does not weigh (arXiv 2408.15664).
      valid: tokens that choose; the others use no expert.
      kernel: ``reference`` or ``pallas``.
      target: what ``pallas`` is compiled for; None: the current mesh or backend.

    Raises:
      ValueError: ``top_k`` is larger than the number of experts.
    """
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k={top_k} must be from 1 to the {logits.shape[1]} experts")
    logits = logits.astype(jnp.float32)
    if bias is None:
        bias = jnp.zeros(logits.shape[1], jnp.float32)
    if valid is None:
        valid = jnp.ones(logits.shape[0], bool)
    if kernel == "pallas":
        results: Any = _pallas(
            top_k, score, target or current_target(), logits.T, bias, valid.astype(jnp.int32)
        )
        experts, gates, rank, counts = results
        return Routing(experts.T, gates.T, rank.T, counts)
    return reference(logits, bias, valid, top_k=top_k, score=score)


def reference(
    logits: Float[Array, "T E"],
    bias: Float[Array, " E"],
    valid: Bool[Array, " T"],
    *,
    top_k: int,
    score: Score,
) -> Routing:
    """The definition, with a table of who chose what, [T E]."""
    num_experts = logits.shape[1]
    scores = _scores(logits, score, axis=1)
    experts = jax.lax.top_k(jax.lax.stop_gradient(scores) + bias, top_k)[1]
    gates = jnp.take_along_axis(scores, experts, axis=1)
    experts = jnp.where(valid[:, None], experts, num_experts)
    rank, counts = _reference_rank(experts, num_experts)
    return Routing(experts, jnp.where(valid[:, None], gates, 0.0), rank, counts)


def rank_in_expert(
    experts: Int[Array, "T K"], *, num_experts: int, kernel: str = "reference", target: Target | None = None
) -> tuple[Int[Array, "T K"], Int[Array, " E"]]:
    """(how many earlier choices name the same expert, choices of every expert), as in ``Routing``.

    Earlier are those of earlier tokens, and of the same token those left of it. Arguments as for
    ``route_top_k``.
    """
    if kernel == "reference":
        return _reference_rank(experts, num_experts)
    target = target or current_target()
    top_k, length = experts.shape[1], experts.shape[0]
    choices = pl.BlockSpec((top_k, TOKEN_TILE), lambda i: (0, i))
    rank, counts = pl.pallas_call(
        functools.partial(_rank_body, length=length),
        grid=(pl.cdiv(length, TOKEN_TILE),),
        in_specs=[choices],
        out_specs=[choices, pl.BlockSpec((num_experts, 1), lambda i: (0, 0))],
        out_shape=[
            jax.ShapeDtypeStruct((top_k, length), jnp.int32),
            jax.ShapeDtypeStruct((num_experts, 1), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=num_experts * length * (2 * TOKEN_TILE + 4 * top_k),
            transcendentals=0,
            bytes_accessed=8 * length * top_k,
        ),
        interpret=target.interpret,
        name="rank_in_expert",
    )(experts.T)
    return rank.T, counts[:, 0]


def _reference_rank(experts: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    flat = experts.reshape(-1)
    chosen = jax.nn.one_hot(flat, num_experts, dtype=jnp.int32)
    earlier = jnp.cumsum(chosen, axis=0) - chosen
    return jnp.sum(earlier * chosen, axis=1).reshape(experts.shape), jnp.sum(chosen, axis=0)


def _scores(logits: jax.Array, score: str, *, axis: int) -> jax.Array:
    if score == "sigmoid":
        return jax.nn.sigmoid(logits)
    exponential = jnp.exp(logits - jnp.max(logits, axis=axis, keepdims=True))
    return exponential / jnp.sum(exponential, axis=axis, keepdims=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _pallas(
    top_k: int, score: Score, target: Target, logits: jax.Array, bias: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(experts, gates, rank [K T], counts [E]) from logits [E T]."""
    num_experts, length = logits.shape
    choices = pl.BlockSpec((top_k, TOKEN_TILE), lambda i: (0, i))
    whole = pl.BlockSpec((num_experts, 1), lambda i: (0, 0))

    def of_choices(dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((top_k, length), dtype)

    experts, gates, rank, counts = pl.pallas_call(
        functools.partial(_route_body, score=score, length=length),
        grid=(pl.cdiv(length, TOKEN_TILE),),
        in_specs=[
            pl.BlockSpec((num_experts, TOKEN_TILE), lambda i: (0, i)),
            whole,
            pl.BlockSpec((1, TOKEN_TILE), lambda i: (0, i)),
        ],
        out_specs=[choices, choices, choices, whole],
        out_shape=[
            of_choices(jnp.int32),
            of_choices(jnp.float32),
            of_choices(jnp.int32),
            jax.ShapeDtypeStruct((num_experts, 1), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=num_experts * length * (2 * TOKEN_TILE + 8 * top_k + 4),
            transcendentals=num_experts * length,
            bytes_accessed=4 * length * (num_experts + 3 * top_k + 1),
        ),
        interpret=target.interpret,
        name="route_top_k",
    )(logits, bias[:, None], valid[None])
    return experts, gates, rank, counts[:, 0]


def _route_body(logits, bias, valid, experts, gates, rank, counts, *, score: Score, length: int):
    step, shape = pl.program_id(0), logits.shape
    expert = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    token = step * shape[1] + jax.lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
    # Lanes past the last token hold anything.
    live = (token < length) & (valid[...] != 0)
    scores = _scores(logits[...], score, axis=0)
    biased = scores + bias[...]
    # Like ``lax.top_k``, take NaN for the largest, so that it shows in a gate.
    biased = jnp.where(biased != biased, jnp.inf, biased)
    picked = jnp.zeros(shape, jnp.int32)
    chosen = []
    for k in range(experts.shape[0]):
        left = jnp.where(picked > 0, -jnp.inf, biased)
        best = jnp.max(left, axis=0, keepdims=True)
        candidates = (left == best) & (picked == 0)
        choice = jnp.min(jnp.where(candidates, expert, shape[0]), axis=0, keepdims=True)
        mine = expert == choice
        picked = jnp.where(mine, 1, picked)
        gate = jnp.sum(jnp.where(mine, scores, 0.0), axis=0, keepdims=True)
        experts[k : k + 1] = jnp.where(live, choice, shape[0])
        gates[k : k + 1] = jnp.where(live, gate, 0.0)
        chosen.append(choice)

    _count(chosen, live, rank, counts)


def _rank_body(experts, rank, counts, *, length: int):
    first = pl.program_id(0) * experts.shape[1]
    token = first + jax.lax.broadcasted_iota(jnp.int32, (1, experts.shape[1]), 1)
    chosen = [experts[k : k + 1] for k in range(experts.shape[0])]
    _count(chosen, token < length, rank, counts)


def _count(chosen: list[jax.Array], live: jax.Array, rank, counts) -> None:
    """Writes the ranks of a tile's choices, and adds them to the running counts.

    Args:
      chosen: i32[1 tokens] per choice; experts that do not exist are not counted.
      live: bool[1 tokens]; the choices of other lanes are not counted.
    """
    num_experts, tokens = counts.shape[0], live.shape[1]
    expert = jax.lax.broadcasted_iota(jnp.int32, (num_experts, tokens), 0)

    @pl.when(pl.program_id(0) == 0)
    def _():
        counts[...] = jnp.zeros_like(counts)

    def mine(choice: jax.Array) -> jax.Array:
        return jnp.where(live & (expert == choice), 1, 0)

    taken = functools.reduce(jnp.add, map(mine, chosen))
    # A sum over earlier tokens, as a product: small integers are exact in bfloat16, their sums in float32.
    square = (tokens, tokens)
    before = jax.lax.broadcasted_iota(jnp.int32, square, 0) < jax.lax.broadcasted_iota(jnp.int32, square, 1)
    earlier = jax.lax.dot_general(
        taken.astype(jnp.float32).astype(jnp.bfloat16),
        before.astype(jnp.float32).astype(jnp.bfloat16),
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    earlier = earlier.astype(jnp.int32) + counts[...]
    for k, choice in enumerate(chosen):
        own = mine(choice)
        rank[k : k + 1] = jnp.sum(own * earlier, axis=0, keepdims=True)
        earlier = earlier + own
    counts[...] += jnp.sum(taken, axis=1, keepdims=True)


def _pallas_forward(
    top_k: int, score: Score, target: Target, logits: jax.Array, bias: jax.Array, valid: jax.Array
) -> tuple[tuple, tuple]:
    results: Any = _pallas(top_k, score, target, logits, bias, valid)
    return results, (logits, bias, results[0])


def _pallas_backward(
    top_k: int, score: Score, target: Target, residual: tuple, grads: tuple
) -> tuple[jax.Array, jax.Array, None]:
    """Scores are recomputed; the gradient of a gate goes to its expert's score by comparison, not scatter."""
    logits, bias, experts = residual
    num_experts, length = logits.shape
    choices = pl.BlockSpec((top_k, TOKEN_TILE), lambda i: (0, i))
    tokens = pl.BlockSpec((num_experts, TOKEN_TILE), lambda i: (0, i))
    grad_logits = pl.pallas_call(
        functools.partial(_grad_body, score=score),
        grid=(pl.cdiv(length, TOKEN_TILE),),
        in_specs=[tokens, choices, choices],
        out_specs=tokens,
        out_shape=jax.ShapeDtypeStruct(logits.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=pl.CostEstimate(
            flops=num_experts * length * (2 * top_k + 6),
            transcendentals=num_experts * length,
            bytes_accessed=8 * length * (num_experts + top_k),
        ),
        interpret=target.interpret,
        name="route_top_k_grad",
    )(logits, experts, grads[1])
    return grad_logits, jnp.zeros_like(bias), None


def _grad_body(logits, experts, grad_gates, grad_logits, *, score: Score):
    expert = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    grad = jnp.zeros(logits.shape, jnp.float32)
    for k in range(experts.shape[0]):
        grad += jnp.where(expert == experts[k : k + 1], grad_gates[k : k + 1], 0.0)
    scores = _scores(logits[...], score, axis=0)
    if score == "sigmoid":
        grad_logits[...] = grad * scores * (1.0 - scores)
    else:
        grad_logits[...] = scores * (grad - jnp.sum(grad * scores, axis=0, keepdims=True))


_pallas.defvjp(_pallas_forward, _pallas_backward)
