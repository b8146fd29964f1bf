"""Convolution over a grid of cells, channels last, with logical names on its parameters."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vl_jax.nn.layers import Init, fan_in, named


def convolve(
    x: Float[Array, "M h w c"], kernel: Float[Array, "p q c D"], *, stride: int = 1, padding: int = 0
) -> Float[Array, "M u v D"]:
    """2D convolution (in truth correlation); ``padding`` zeros on all four sides."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class Conv(nn.Module):
    """Square convolution. Without padding, a rest on the right and at the bottom is never seen."""

    features: int
    size: int  # cells on the side of the kernel
    stride: int = 1
    padding: int = 0
    use_bias: bool = False
    kernel_init: Init = fan_in(in_axis=(0, 1, 2))

    @nn.compact
    def __call__(self, x: Float[Array, "M h w c"]) -> Float[Array, "M u v D"]:
        init = named(self.kernel_init, None, None, None, "embed", inputs=(0, 1, 2))
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", init, shape)
        y = convolve(x, kernel.astype(x.dtype), stride=self.stride, padding=self.padding)
        if self.use_bias:
            bias = self.param("bias", named(nn.initializers.zeros, "embed"), (self.features,))
            y = y + bias.astype(x.dtype)
        return y


class VolumeConv(nn.Module):
    """Convolution over frames (or slices), rows and columns, without bias; zeros stand outside."""

    features: int
    size: tuple[int, int, int]
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] = (0, 0, 0)
    kernel_init: Init = fan_in(in_axis=(0, 1, 2, 3))

    @nn.compact
    def __call__(self, x: Float[Array, "M f h w c"]) -> Float[Array, "M t u v D"]:
        init = named(self.kernel_init, None, None, None, None, "embed", inputs=(0, 1, 2, 3))
        kernel = self.param("kernel", init, (*self.size, x.shape[-1], self.features))
        return jax.lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            self.stride,
            [(n, n) for n in self.padding],
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )


def group_norm(
    x: Float[Array, "M h w D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    *,
    groups: int,
    epsilon: float,
) -> Float[Array, "M h w D"]:
    """Group normalisation in float32, cast back; ``groups`` must divide D (Wu and He 2018, 1803.08494)."""
    wide = x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1)
    centred = wide - jnp.mean(wide, axis=(1, 2, 4), keepdims=True)
    variance = jnp.mean(centred * centred, axis=(1, 2, 4), keepdims=True)
    normed = (centred * jax.lax.rsqrt(variance + epsilon)).reshape(x.shape)
    return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class GroupNorm(nn.Module):
    """Normalisation of each picture by itself, over its cells and the channels of a group."""

    groups: int = 8
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "M h w D"]) -> Float[Array, "M h w D"]:
        scale = self.param("scale", named(nn.initializers.ones, None), (x.shape[-1],))
        bias = self.param("bias", named(nn.initializers.zeros, None), (x.shape[-1],))
        return group_norm(x, scale, bias, groups=self.groups, epsilon=self.epsilon)
