"""Norms, projections and feed-forward blocks, with logical names on every parameter."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vl_jax.kernels.activation import SWIGLU, Activation
from vl_jax.roles import Named, role_of
from vl_jax.sharding import constrain_weight, gather_weight

Init = jax.nn.initializers.Initializer


def fan_in(
    *, in_axis: int | tuple[int, ...] = 0, batch_axis: tuple[int, ...] = (), scale: float = 1.0
) -> Init:
    """Truncated normal of variance scale / fan-in, the default for every projection here.

    Axes named neither input nor batch are outputs, however many heads or halves they are cut into.
    """
    inputs = (in_axis,) if isinstance(in_axis, int) else in_axis

    def init(key: Any, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
        outputs = [a for a in range(len(shape)) if a not in inputs and a not in batch_axis]
        scaled = jax.nn.initializers.variance_scaling(
            scale, "fan_in", "truncated_normal", in_axis=inputs, out_axis=outputs, batch_axis=batch_axis
        )
        return scaled(key, shape, dtype, out_sharding=out_sharding)

    return init


def named(
    init: Init,
    *names: str | None,
    inputs: tuple[int, ...] = (),
    outputs: tuple[int, ...] = (),
    decay: bool | None = None,
) -> Any:
    """An initialiser whose parameter carries logical dimension names, and its role.

    Args:
      inputs: axes of a hidden matrix that its input is summed over. Empty for whatever is none: embedding,
        head, router, norms, biases, positions.
      outputs: axes that its output has; empty: all that are no inputs.
      decay: whether weight decay draws it to zero; None: exactly if it is a hidden matrix.
    """
    experts = names.index("experts") if "experts" in names else None
    role = role_of(len(names), inputs=inputs, outputs=outputs, decay=decay, experts=experts)

    @functools.wraps(init)
    def boxed(*args: Any, **kwargs: Any) -> Named:
        return Named(init(*args, **kwargs), names, role=role)

    return boxed


def as_used(weight: jax.Array, dtype: Any, *names: str | None, rows: int | None = None) -> jax.Array:
    """A weight in the dtype that it is used in, still cut as it is kept: what is gathered then is small.

    Args:
      names: of its dimensions, as at its creation.
      rows: of the batch that it is multiplied with: it is gathered along the axes that cut them; None: not.
    """
    kept = constrain_weight(weight.astype(dtype), *names)
    return kept if rows is None else gather_weight(kept, *names, rows=rows)


def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, " D"], *, epsilon: float
) -> Float[Array, "*batch D"]:
    """``x / rms(x) * scale``: computed in float32, cast back, then scaled (the order of DeepSeek-V2)."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param("scale", named(nn.initializers.ones, None), (x.shape[-1],))
        return rms_norm(x, scale, epsilon=self.epsilon)


def layer_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, " D"], bias: Float[Array, " D"], *, epsilon: float
) -> Float[Array, "*batch D"]:
    """Layer normalisation in float32, cast back to the dtype of ``x``."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + epsilon)
    return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last dimension."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = self.param("scale", named(nn.initializers.ones, None), (x.shape[-1],))
        bias = self.param("bias", named(nn.initializers.zeros, None), (x.shape[-1],))
        return layer_norm(x, scale, bias, epsilon=self.epsilon)


@jax.custom_vjp
def project(x: Float[Array, "*batch D"], kernel: Float[Array, "D F"]) -> Float[Array, "*batch F"]:
    """``x @ kernel``, whose weight gradient transposes the narrower of ``x`` and the output's gradient.

    Autodiff always transposes the latter, which a CPU does slowly: with the output head of a small model,
    whose gradient is thousands wide, a step took a fifth longer.
    """
    return x @ kernel


def _project_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _project_backward(residual: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = residual
    batch = tuple(range(x.ndim - 1))
    if x.shape[-1] > grad.shape[-1]:
        grad_kernel = jax.lax.dot_general(grad, x, ((batch, batch), ((), ()))).T
    else:
        grad_kernel = jax.lax.dot_general(x, grad, ((batch, batch), ((), ())))
    return grad @ kernel.T, grad_kernel


project.defvjp(_project_forward, _project_backward)


def split_heads(x: Float[Array, "*batch D"], kernel: Float[Array, "D N H"]) -> Float[Array, "*batch N H"]:
    """The projections of every head, as one product."""
    width, heads, size = kernel.shape
    return project(x, kernel.reshape(width, -1)).reshape(*x.shape[:-1], heads, size)


def join_heads(x: Float[Array, "*batch N H"], kernel: Float[Array, "N H D"]) -> Float[Array, "*batch D"]:
    """The sum of every head's projection, as one product."""
    return project(x.reshape(*x.shape[:-2], -1), kernel.reshape(-1, kernel.shape[-1]))


class Linear(nn.Module):
    """``x @ kernel (+ bias)`` with logical names for the two sides of the kernel."""

    features: int
    names: tuple[str | None, str | None]
    use_bias: bool = False
    kernel_init: Init = fan_in()
    hidden: bool = True  # False for a head, whose features are read as logits

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch F"]:
        init = named(self.kernel_init, *self.names, inputs=(0,) if self.hidden else (), decay=True)
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        y = project(x, as_used(kernel, x.dtype, *self.names, rows=x.shape[0]))
        if self.use_bias:
            bias = self.param("bias", named(nn.initializers.zeros, self.names[1]), (self.features,))
            y = y + bias.astype(x.dtype)
        return y


class GatedMLP(nn.Module):
    """Feed-forward block; ``w_in`` stacks the projections that the activation takes (gate and up)."""

    mlp_dim: int
    activation: Activation = SWIGLU
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        width, inputs = x.shape[-1], self.activation.inputs
        init = named(fan_in(), "embed", None, "mlp", inputs=(0,), outputs=(2,))
        w_in = self.param("w_in", init, (width, inputs, self.mlp_dim))
        w_out = self.param("w_out", named(fan_in(), "mlp", "embed", inputs=(0,)), (self.mlp_dim, width))
        w_in = as_used(w_in, x.dtype, "embed", None, "mlp", rows=x.shape[0])
        hidden = project(x, w_in.reshape(width, -1))
        if self.use_bias:
            b_in = self.param("b_in", named(nn.initializers.zeros, None, "mlp"), w_in.shape[1:])
            hidden = hidden + b_in.reshape(-1).astype(x.dtype)
        y = project(self.activation(hidden), as_used(w_out, x.dtype, "mlp", "embed", rows=x.shape[0]))
        if self.use_bias:
            b_out = self.param("b_out", named(nn.initializers.zeros, None), (width,))
            y = y + b_out.astype(x.dtype)
        return y
