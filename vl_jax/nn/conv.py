"""Convolution over a grid of cells, channels last, with logical names on its parameters."""

from __future__ import annotations

import flax.linen as nn
import jax
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
