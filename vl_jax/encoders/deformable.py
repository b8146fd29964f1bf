"""Deformable convolution, v2 (Zhu et al. 2019, arXiv 1811.11168): every tap is moved, and weighted, by place.

    y(p) = sum over taps k of  kernel[k] . mask(p, k) * x(p + place of k + offset(p, k))

``x`` between cells is interpolated linearly along both axes, and zero outside. Two forms compute the same:

* ``sample`` reads any offset. The four neighbours of a place stand in one row of a table, so that a place is
  one row of one gather.
* ``sample_near`` reads offsets from -1 to 1, as sums of shifted grids with weights max(0, 1 - |distance|). No
  index depends on data, so it shards and exports like any convolution.

Offsets are (down, right), tap by tap and row by row; tests compare all of it with a loop over places.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vl_jax.nn.layers import fan_in, named

Form = Literal["gather", "near"]


@dataclasses.dataclass(frozen=True)
class Taps:
    """Where the taps of a convolution lie."""

    size: int = 3  # taps on the side
    stride: int = 1
    padding: int = 1  # zeros on all four sides
    dilation: int = 1  # cells from tap to tap

    def __post_init__(self):
        if min(self.size, self.stride, self.dilation) < 1 or self.padding < 0:
            raise ValueError(
                f"size={self.size}, stride={self.stride}, dilation={self.dilation}: must be >= 1, padding="
                f"{self.padding}: >= 0"
            )

    def places(self, length: int) -> int:
        """How many places there are along an axis of so many cells."""
        return (length + 2 * self.padding - self.dilation * (self.size - 1) - 1) // self.stride + 1

    @property
    def offsets(self) -> tuple[tuple[int, int], ...]:
        """Row and column of every tap beside the first one."""
        line = range(0, self.size * self.dilation, self.dilation)
        return tuple((i, j) for i in line for j in line)


def sample(
    x: Float[Array, "M h w C"], offsets: Float[Array, "M u v G K 2"], taps: Taps
) -> Float[Array, "M u v K C"]:
    """What every tap sees, at any offset.

    Args:
      offsets: by group of channels and tap, how far down and right of its place it reads.
    """
    images, height, width, channels = x.shape
    _, u, v, groups, count, _ = offsets.shape
    own = channels // groups
    down, right = _starts(taps, u, v)
    row = down[None, :, None, None] + offsets[..., 0]
    column = right[None, None, :, None] + offsets[..., 1]
    inside = (row > -1) & (row < height) & (column > -1) & (column < width)
    # Row y + 1, column x + 1 of the table: the cells (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1).
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(images, height + 2, width + 2, groups, own)
    parts = [padded[:, i : i + height + 1, j : j + width + 1] for i in (0, 1) for j in (0, 1)]
    table = jnp.moveaxis(jnp.stack(parts, axis=4), 3, 1).reshape(images * groups, -1, 4 * own)
    top, left = (
        jnp.clip(jnp.floor(jax.lax.stop_gradient(place)), -1, last - 1)
        for place, last in ((row, height), (column, width))
    )
    index = (top + 1) * (width + 1) + left + 1
    index = jnp.moveaxis(index, 3, 1).reshape(images * groups, -1).astype(jnp.int32)
    found = jax.vmap(lambda rows, at: rows[at])(table, index)
    found = found.reshape(images, groups, u, v, count, 4, own)
    low, near = row - top, column - left
    weights = jnp.stack([(1 - low) * (1 - near), (1 - low) * near, low * (1 - near), low * near], axis=-1)
    weights = jnp.where(inside[..., None], weights, 0).astype(x.dtype)
    return jnp.einsum("MGuvKFC,MuvGKF->MuvKGC", found, weights).reshape(images, u, v, count, channels)


def sample_near(
    x: Float[Array, "M h w C"], offsets: Float[Array, "M u v G K 2"], taps: Taps
) -> Float[Array, "M u v K C"]:
    """What every tap sees, at offsets that are clipped to [-1, 1]; the arguments are those of ``sample``."""
    images, _, _, channels = x.shape
    _, u, v, groups, count, _ = offsets.shape
    beyond = taps.padding + 1
    padded = jnp.pad(x, ((0, 0), (beyond, beyond), (beyond, beyond), (0, 0)))
    padded = padded.reshape(*padded.shape[:3], groups, -1)
    offsets = jnp.clip(offsets, -1, 1)
    down, right = (
        {step: jnp.maximum(1 - jnp.abs(offsets[..., axis] - step), 0).astype(x.dtype) for step in (-1, 0, 1)}
        for axis in (0, 1)
    )
    rows, columns = ((n - 1) * taps.stride + 1 for n in (u, v))
    seen = []
    for k, (i, j) in enumerate(taps.offsets):
        total = jnp.zeros((images, u, v, groups, channels // groups), x.dtype)
        for a in (-1, 0, 1):
            for b in (-1, 0, 1):
                top, left = i + a + 1, j + b + 1
                cells = padded[:, top : top + rows : taps.stride, left : left + columns : taps.stride]
                total = total + (down[a] * right[b])[..., k, None] * cells
        seen.append(total.reshape(images, u, v, channels))
    return jnp.stack(seen, axis=3)


def _starts(taps: Taps, u: int, v: int) -> tuple[Float[Array, "u K"], Float[Array, "v K"]]:
    """The rows and the columns at which taps read without an offset, by place and tap."""
    place = jnp.asarray(taps.offsets, jnp.float32)
    rows, columns = (jnp.arange(n, dtype=jnp.float32) * taps.stride - taps.padding for n in (u, v))
    return rows[:, None] + place[:, 0], columns[:, None] + place[:, 1]


FORMS = {"gather": sample, "near": sample_near}


def deform(
    x: Float[Array, "M h w C"],
    offsets: Float[Array, "M u v G K 2"],
    mask: Float[Array, "M u v G K"],
    kernel: Float[Array, "p q C D"],
    *,
    taps: Taps,
    form: Form = "gather",
) -> Float[Array, "M u v D"]:
    """The convolution, by either form; ``near`` clips the offsets."""
    seen = FORMS[form](x, offsets, taps)
    groups, count = mask.shape[3:]
    shape = (*seen.shape[:3], count, groups, -1)
    seen = seen.reshape(shape) * mask.swapaxes(3, 4)[..., None].astype(x.dtype)
    kernel = kernel.astype(x.dtype).reshape(count, groups, -1, kernel.shape[-1])
    return jnp.einsum("MuvKGC,KGCD->MuvD", seen, kernel)


class DeformableConv(nn.Module):
    """A convolution that learns where to look; it begins as a plain one, with no offset and a mask of 1.

    The mask is twice a sigmoid, where the paper has it once: a factor that the kernel absorbs.
    """

    features: int
    taps: Taps = Taps()
    groups: int = 1  # of channels that have offsets of their own
    form: Form = "near"

    @nn.compact
    def __call__(self, x: Float[Array, "M h w C"]) -> Float[Array, "M u v D"]:
        taps, count = self.taps, self.taps.size**2
        # As a convolution of its own, so that an optimiser can let it learn more slowly.
        branch = named(nn.initializers.zeros, None, None, None, None, inputs=(0, 1, 2))
        shape = (taps.size, taps.size, x.shape[-1], 3 * self.groups * count)
        kernel = self.param("branch", branch, shape).astype(x.dtype)
        bias = self.param("branch_bias", named(nn.initializers.zeros, None), shape[-1:]).astype(x.dtype)
        said = jax.lax.conv_general_dilated(
            x,
            kernel,
            (taps.stride, taps.stride),
            [(taps.padding, taps.padding)] * 2,
            rhs_dilation=(taps.dilation, taps.dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        said = (said + bias).astype(jnp.float32).reshape(*said.shape[:3], self.groups, count, 3)
        self.sow("intermediates", "offsets", said[..., :2])
        init = named(fan_in(in_axis=(0, 1, 2)), None, None, None, "embed", inputs=(0, 1, 2))
        kernel = self.param("kernel", init, (taps.size, taps.size, x.shape[-1], self.features))
        mask = 2 * jax.nn.sigmoid(said[..., 2])
        return deform(x, said[..., :2], mask, kernel, taps=taps, form=self.form)
