"""A feature pyramid (Lin et al. 2017, arXiv 1612.03144): maps of several resolutions learn from one another.

    coarsest map --1x1--> + --3x3--> level
                          | nearest neighbour
    next map     --1x1--> + --3x3--> level        and, if asked for, back from the finest to the coarsest

Norms are of groups of one picture's channels, so rows do not act on one another.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vl_jax.encoders.resnet import HE
from vl_jax.nn.conv import Conv, GroupNorm
from vl_jax.params import Leaf

GROUPS = 8  # of a group norm; widths are multiples of it


class MapBlock(nn.Module):
    """Convolution, group norm, SiLU."""

    width: int
    size: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B u v D"]:
        conv = Conv(self.width, self.size, self.stride, self.size // 2, kernel_init=HE, name="conv")
        return nn.silu(GroupNorm(GROUPS, name="norm")(conv(x)))


def nearest(x: Float[Array, "B h w D"], shape: tuple[int, int]) -> Float[Array, "B u v D"]:
    """The map at a finer grid: every cell takes what the coarse cell under its centre has."""
    rows, columns = (
        (jnp.arange(new) * 2 + 1) * old // (2 * new) for new, old in zip(shape, x.shape[1:3], strict=True)
    )
    return x[:, rows][:, :, columns]


class Pyramid(nn.Module):
    """Maps of one width, from the finest to the coarsest; their grids stay."""

    width: int
    bottom_up: bool = False

    @nn.compact
    def __call__(self, maps: tuple[Leaf, ...]) -> tuple[jax.Array, ...]:
        found: list[jax.Array] = []
        for i, x in reversed(list(enumerate(maps))):
            x = Conv(self.width, 1, use_bias=True, name=f"lateral{i}")(x)
            if found:
                x = x + nearest(found[0], (x.shape[1], x.shape[2]))
            found.insert(0, MapBlock(self.width, name=f"level{i}")(x))
        if not self.bottom_up:
            return tuple(found)
        result = found[:1]
        for i, x in enumerate(found[1:], 1):
            halved = MapBlock(self.width, stride=2, name=f"down{i}")(result[-1])
            if halved.shape != x.shape:
                raise ValueError(
                    f"bottom_up: a map of {x.shape[1:3]} cells follows one of {result[-1].shape[1:3]}; "
                    "expected half as many on a side"
                )
            result.append(MapBlock(self.width, name=f"up{i}")(x + halved))
        return tuple(result)
