"""Adam whose second moment is that of another gradient, so that weights of gradients act on its updates.

    m <- b1 m + (1 - b1) gradient      v <- b2 v + (1 - b2) plain^2      update = m / (sqrt(v) + epsilon)

With ``gradient == plain`` this is Adam. A constant factor on the gradient is that factor on the update, which
Adam would cancel: see ``fusing``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def clipped_plain_adam(
    limit: float, betas: tuple[float, float], epsilon: float
) -> optax.GradientTransformationExtraArgs:
    """Both gradients are scaled down alike, where the norm of the plain one is above a limit.

    ``update`` takes it as ``plain``.
    """
    adam = optax.scale_by_adam(*betas, eps=epsilon)

    def update(
        updates: Any, state: optax.ScaleByAdamState, params: Any = None, *, plain: Any, **extra: Any
    ) -> tuple[Any, optax.ScaleByAdamState]:
        del params, extra
        norm = optax.tree.norm(plain)
        factor = jnp.where(norm < limit, 1.0, limit / norm)
        updates, plain = (jax.tree.map(lambda g: g * factor.astype(g.dtype), t) for t in (updates, plain))
        mean = optax.tree.update_moment(updates, state.mu, betas[0], 1)
        square = optax.tree.update_moment_per_elem_norm(plain, state.nu, betas[1], 2)
        count = optax.safe_increment(state.count)
        unbiased = (
            optax.tree.bias_correction(tree, decay, count)
            for tree, decay in zip((mean, square), betas, strict=True)
        )
        scaled = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + epsilon), *unbiased)
        return scaled, optax.ScaleByAdamState(count=count, mu=mean, nu=square)

    return optax.GradientTransformationExtraArgs(adam.init, update)  # pyright: ignore[reportArgumentType]
