"""The grouped feed-forward for CPUs: every group in blocks of rows, so that the work is that of its rows.

    group of e: | block of 256 | block of 256 | rest, cut to the next multiple of 32, or of 16 |

Full blocks read an expert's weights seldom; the cut keeps many small groups from being mostly padding. The
finer one is for groups of about a block: it halves their padding, and there is twice as much to compile.

Under ``vmap`` one element follows another: mapped as a whole, every cut would be computed for every block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from vl_jax.kernels.activation import Activation
from vl_jax.kernels.expert_weights import ExpertWeights, flat, project

BLOCK_ROWS = 256
STEP_ROWS, FINE_STEP_ROWS = 32, 16


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a group is walked through: ``rows`` at a time, the last block cut to a multiple of ``step``."""

    rows: int
    step: int

    @classmethod
    def of(cls, num_rows: int, num_groups: int) -> Blocks:
        """Those for so many rows in all: few need no large blocks, nor compiled code for many cuts."""
        step = FINE_STEP_ROWS if BLOCK_ROWS <= num_rows <= BLOCK_ROWS * num_groups else STEP_ROWS
        return cls(min(BLOCK_ROWS, -(-max(num_rows, 1) // step) * step), step)

    def walk(
        self,
        start: jax.Array,
        end: jax.Array,
        block: Callable[[jax.Array, Any], Any],
        carry: Any,
        *,
        done: int = 0,
    ) -> Any:
        """``block(first row, carry)`` for the blocks of a group, one after the other, but for those done."""
        count = -(-(end - start) // self.rows)
        return jax.lax.fori_loop(done, count, lambda b, carry: block(start + b * self.rows, carry), carry)

    def cut(self, compute: Callable[[int], Any], rows_left: jax.Array) -> Any:
        """``compute(size)`` for the smallest size that holds the rows left, or that of a full block."""
        sizes = range(self.step, self.rows + 1, self.step)
        branch = jnp.clip((rows_left - 1) // self.step, 0, len(sizes) - 1)
        return jax.lax.switch(branch, [functools.partial(compute, size) for size in sizes])

    def pad(self, rows: jax.Array) -> jax.Array:
        """Room for the last block of the last group, which may reach past the rows."""
        return jnp.pad(rows, ((0, self.rows), (0, 0)))

    def full(self, cut: jax.Array) -> jax.Array:
        """A cut block with zeros up to the size of a full one."""
        return jnp.pad(cut, ((0, self.rows - cut.shape[0]), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blocked_mlp(
    activation: Activation,
    rows: Float[Array, "R D"],
    group_sizes: Int[Array, " E"],
    weights: ExpertWeights,
) -> Float[Array, "R D"]:
    """Applies expert e to the rows of group e; rows past the last group give zeros."""
    return _forward(activation, rows, group_sizes, weights)[0]


def _forward(
    activation: Activation, rows: jax.Array, group_sizes: jax.Array, weights: ExpertWeights
) -> tuple[jax.Array, tuple]:
    compute = sequential_vmap(functools.partial(_outputs, activation))
    out, projected = compute(rows, group_sizes, weights)
    return out, (rows, group_sizes, weights, projected)


def _outputs(
    activation: Activation, rows: jax.Array, group_sizes: jax.Array, weights: ExpertWeights
) -> tuple[jax.Array, jax.Array]:
    """The rows after their experts, and their projections before the activation."""
    num_rows = rows.shape[0]
    blocks = Blocks.of(num_rows, group_sizes.shape[0])
    padded = blocks.pad(rows)

    def one_expert(carry: tuple[jax.Array, jax.Array], expert: tuple) -> tuple[tuple, None]:
        start, end, w = expert

        def block(first: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            def compute(size: int) -> tuple[jax.Array, jax.Array]:
                hidden = project(_slice(padded, first, size), w.w_in, w.b_in)
                return blocks.full(project(activation(hidden), w.w_out, w.b_out)), blocks.full(hidden)

            out, hidden = blocks.cut(compute, end - first)
            # A block may reach into the next group; the blocks of that group come later and overwrite it.
            return _update(carry[0], out, first), _update(carry[1], hidden, first)

        return blocks.walk(start, end, block, carry), None

    begun = jnp.zeros_like(padded), jnp.zeros((padded.shape[0], flat(weights.w_in).shape[-1]), rows.dtype)
    (out, projected), _ = jax.lax.scan(one_expert, begun, (*_bounds(group_sizes), _flat_weights(weights)))
    return _without_rest(out, group_sizes, num_rows), projected


def _backward(
    activation: Activation, residual: tuple, grad: jax.Array
) -> tuple[jax.Array, None, ExpertWeights]:
    grad_rows, total = sequential_vmap(functools.partial(_gradients, activation))(*residual, grad)
    return grad_rows, None, total


def _gradients(
    activation: Activation,
    rows: jax.Array,
    group_sizes: jax.Array,
    weights: ExpertWeights,
    projected: jax.Array,
    grad: jax.Array,
) -> tuple[jax.Array, ExpertWeights]:
    blocks = Blocks.of(rows.shape[0], group_sizes.shape[0])
    padded, padded_grad = blocks.pad(rows), blocks.pad(grad)

    def one_expert(grad_rows: jax.Array, expert: tuple) -> tuple[jax.Array, ExpertWeights]:
        start, end, w = expert

        def block(first: jax.Array, grad_rows: jax.Array) -> tuple[jax.Array, ExpertWeights]:
            def compute(size: int) -> tuple[jax.Array, ExpertWeights]:
                mine = (first + jnp.arange(size) < end)[:, None]
                upstream = jnp.where(mine, _slice(padded_grad, first, size), 0)
                activated, pullback = jax.vjp(activation, jnp.where(mine, _slice(projected, first, size), 0))
                (grad_hidden,) = pullback(upstream @ w.w_out.T)
                of_weights = ExpertWeights(
                    # In its final shape: behind the scan XLA would copy the whole stack to change it.
                    w_in=(_slice(padded, first, size).T @ grad_hidden).reshape(weights.w_in.shape[1:]),
                    w_out=activated.T @ upstream,
                    b_in=None if w.b_in is None else jnp.sum(grad_hidden, axis=0).reshape(w.b_in.shape),
                    b_out=None if w.b_out is None else jnp.sum(upstream, axis=0),
                )
                return blocks.full(grad_hidden @ w.w_in.T), of_weights

            grad_block, of_weights = blocks.cut(compute, end - first)
            return _update(grad_rows, grad_block, first), of_weights

        def another(first: jax.Array, carry: tuple[jax.Array, ExpertWeights]) -> tuple:
            grad_rows, of_weights = block(first, carry[0])
            return grad_rows, jax.tree.map(jnp.add, carry[1], of_weights)

        # The first block is outside of the loop: most groups have no other, and need no sum.
        return blocks.walk(start, end, another, block(start, grad_rows), done=1)

    experts = (*_bounds(group_sizes), _flat_weights(weights))
    grad_rows, total = jax.lax.scan(one_expert, jnp.zeros_like(padded), experts)
    return _without_rest(grad_rows, group_sizes, rows.shape[0]), total


blocked_mlp.defvjp(_forward, _backward)


def _flat_weights(weights: ExpertWeights) -> ExpertWeights:
    return dataclasses.replace(weights, w_in=flat(weights.w_in))


def _bounds(group_sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First row and end of every group."""
    ends = jnp.cumsum(group_sizes)
    return ends - group_sizes, ends


def _slice(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size)


def _update(x: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, block, start, axis=0)


def _without_rest(rows: jax.Array, group_sizes: jax.Array, num_rows: int) -> jax.Array:
    used = jnp.arange(num_rows) < jnp.sum(group_sizes)
    return jnp.where(used[:, None], rows[:num_rows], 0)
