"""Grouped SwiGLU: rows sorted by expert, each group through its own expert's two matrices.

    rows [R D], group_sizes [E]  ->  (silu(rows @ gate_e) * (rows @ up_e)) @ down_e   [R D]

``blocked`` walks the groups in blocks of rows, so that the work is that of the rows actually present: the
form for CPUs, where ``lax.ragged_dot`` multiplies every row by every expert. ``reference`` is the plain
definition.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK_ROWS = 128


def grouped_swiglu(
    rows: Float[Array, "R D"],
    group_sizes: Int[Array, " E"],
    w_in: Float[Array, "E D 2 F"],
    w_out: Float[Array, "E F D"],
    *,
    kernel: str = "blocked",
) -> Float[Array, "R D"]:
    """Applies expert e to the rows of group e; rows past the last group give zeros.

    Args:
      kernel: ``blocked`` or ``reference``.
    """
    if kernel == "reference":
        return reference(rows, group_sizes, w_in, w_out)
    return _blocked(rows, group_sizes, w_in, w_out)


def reference(
    rows: Float[Array, "R D"],
    group_sizes: Int[Array, " E"],
    w_in: Float[Array, "E D 2 F"],
    w_out: Float[Array, "E F D"],
) -> Float[Array, "R D"]:
    """Every expert on every row, one at a time, masked to its group."""
    ends = jnp.cumsum(group_sizes)
    index = jnp.arange(rows.shape[0])

    def one_expert(total: jax.Array, expert: tuple) -> tuple[jax.Array, None]:
        start, end, w_in_e, w_out_e = expert
        gate, up = jnp.moveaxis(jnp.einsum("RD,DXF->RXF", rows, w_in_e), 1, 0)
        out = (jax.nn.silu(gate) * up) @ w_out_e
        mine = (index >= start) & (index < end)
        return total + jnp.where(mine[:, None], out, 0), None

    return jax.lax.scan(one_expert, jnp.zeros_like(rows), (ends - group_sizes, ends, w_in, w_out))[0]


def _block_table(group_sizes: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(number of blocks, expert of each block, its first row, end of its group); static upper bound."""
    num_experts = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes)
    blocks = -(-group_sizes // BLOCK_ROWS)
    block_ends = jnp.cumsum(blocks)
    index = jnp.arange(-(-num_rows // BLOCK_ROWS) + num_experts, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(block_ends, index, side="right"), num_experts - 1)
    within = index - (block_ends - blocks)[expert]
    first = (ends - group_sizes)[expert] + within * BLOCK_ROWS
    return block_ends[-1], expert.astype(jnp.int32), first.astype(jnp.int32), ends[expert]


def _slice(x: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, BLOCK_ROWS)


def _update(x: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, block, start, axis=0)


def _pad(rows: jax.Array) -> jax.Array:
    """Room for the last block of the last group, which may reach past the rows."""
    return jnp.pad(rows, ((0, BLOCK_ROWS), (0, 0)))


def _mask_tail(rows: jax.Array, group_sizes: jax.Array, num_rows: int) -> jax.Array:
    used = jnp.arange(num_rows) < jnp.sum(group_sizes)
    return jnp.where(used[:, None], rows[:num_rows], 0)


@jax.custom_vjp
def _blocked(rows: jax.Array, group_sizes: jax.Array, w_in: jax.Array, w_out: jax.Array) -> jax.Array:
    return _blocked_forward(rows, group_sizes, w_in, w_out)[0]


def _blocked_forward(rows: jax.Array, group_sizes: jax.Array, w_in: jax.Array, w_out: jax.Array):
    num_rows, width = rows.shape
    hidden_dim = w_out.shape[1]
    count, expert, first, _ = _block_table(group_sizes, num_rows)
    padded, flat_in = _pad(rows), w_in.reshape(w_in.shape[0], width, -1)

    def body(b: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # A block may reach into the next group; the blocks of that group come later and overwrite it.
        out, both = carry
        e, start = expert[b], first[b]
        hidden = _slice(padded, start) @ flat_in[e]
        block = jax.nn.silu(hidden[:, :hidden_dim]) * hidden[:, hidden_dim:]
        return _update(out, block @ w_out[e], start), _update(both, hidden, start)

    both = jnp.zeros((padded.shape[0], 2 * hidden_dim), rows.dtype)
    out, both = jax.lax.fori_loop(0, count, body, (jnp.zeros_like(padded), both))
    return _mask_tail(out, group_sizes, num_rows), (rows, group_sizes, w_in, w_out, both)


def _blocked_backward(residual: tuple, grad: jax.Array):
    rows, group_sizes, w_in, w_out, both = residual
    num_rows, width = rows.shape
    hidden_dim = w_out.shape[1]
    count, expert, first, end = _block_table(group_sizes, num_rows)
    padded, padded_grad = _pad(rows), _pad(grad)
    flat_in = w_in.reshape(w_in.shape[0], width, -1)

    def body(b: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]):
        grad_rows, grad_in, grad_out = carry
        e, start = expert[b], first[b]
        mine = (start + jnp.arange(BLOCK_ROWS) < end[b])[:, None]
        upstream = jnp.where(mine, _slice(padded_grad, start), 0)
        hidden = _slice(both, start)
        activated, pullback = jax.vjp(
            lambda h: jax.nn.silu(h[:, :hidden_dim]) * h[:, hidden_dim:], jnp.where(mine, hidden, 0)
        )
        (grad_hidden,) = pullback(upstream @ w_out[e].T)
        grad_out = grad_out.at[e].add(activated.T @ upstream)
        grad_in = grad_in.at[e].add(_slice(padded, start).T @ grad_hidden)
        return _update(grad_rows, grad_hidden @ flat_in[e].T, start), grad_in, grad_out

    zeros = (jnp.zeros_like(padded), jnp.zeros_like(flat_in), jnp.zeros_like(w_out))
    grad_rows, grad_in, grad_out = jax.lax.fori_loop(0, count, body, zeros)
    grad_rows = _mask_tail(grad_rows, group_sizes, num_rows)
    return grad_rows, None, grad_in.reshape(w_in.shape), grad_out


_blocked.defvjp(_blocked_forward, _blocked_backward)
