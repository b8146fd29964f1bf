"""The decoder that heads of pixels share: maps of several resolutions in, one fine map out.

    coarsest map --x2, 3x3--> join the next finer map --2 x (3x3, group norm, SiLU)--> x2 ... --> [B u v D]

The form is that of U-Net (Ronneberger et al. 2015, arXiv 1505.04597), with the nearest neighbour in place of
transposed convolutions, which leave a chequered pattern.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vl_jax.encoders.resnet import HE
from vl_jax.fusion.streams import Stream
from vl_jax.nn.conv import Conv, GroupNorm
from vl_jax.params import Leaf

GROUPS = 8  # of a group norm; widths of decoders are multiples of it


def check_sizes(head: str, *, size: int, stride: int, dim: int) -> None:
    """Makes sure that a head of pixels can be built.

    Args:
      head: its name, for the message.
      size: pixels on the side of the tile.
      stride: pixels on the side of a cell of the decoder's last map.
      dim: width of the decoder.

    Raises:
      ValueError: a number is out of range.
    """
    if size < 1 or not 1 <= stride <= size:
        raise ValueError(f"size={size}, stride={stride} of head {head!r}: must be 1 <= stride <= size")
    if dim < GROUPS or dim % GROUPS:
        raise ValueError(f"dim={dim} of head {head!r} must be a multiple of {GROUPS}")


def check_tile(head: str, size: int, tile_size: int) -> None:
    """Makes sure that a head of pixels and the tiles of the data are of one size; ValueError if not."""
    if size != tile_size:
        raise ValueError(f"data.tiling.tile_size={tile_size} differs from size={size} of head {head!r}")


def maps_of(stream: Stream, *, head: str, name: str) -> tuple[Leaf, ...]:
    """The maps of a stream, finest first.

    Raises:
      ValueError: it has none.
    """
    if not stream.maps:
        raise ValueError(
            f"head {head!r}: stream {name!r} has no maps; it has to be a tower with maps (such as a ResNet) "
            "that sees one tile a row (data.max_tiles=1), and no fusion may have changed it"
        )
    return stream.maps


def doubled(x: Float[Array, "B h w D"], shape: tuple[int, int]) -> Float[Array, "B u v D"]:
    """Each cell twice in both directions until the map covers ``shape``; what is beyond is cut."""
    while x.shape[1] < shape[0] or x.shape[2] < shape[1]:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return x[:, : shape[0], : shape[1]]


def enlarged(x: Float[Array, "B h w K"], size: int) -> Float[Array, "B s s K"]:
    """A map at the size of the tile, bilinear."""
    return jax.image.resize(x, (x.shape[0], size, size, x.shape[-1]), "bilinear")


class Smooth(nn.Module):
    """Twice: 3x3 convolution, group norm, SiLU."""

    dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w D"]:
        for i in range(2):
            x = Conv(self.dim, size=3, padding=1, kernel_init=HE, name=f"conv{i}")(x)
            x = nn.silu(GroupNorm(GROUPS, name=f"norm{i}")(x))
        return x


class MapDecoder(nn.Module):
    """Goes from the coarsest map up to cells of ``stride`` pixels; finer maps than that are not read."""

    dim: int
    size: int  # pixels on the side of the tile
    stride: int  # of the last map

    @nn.compact
    def __call__(self, maps: tuple[Leaf, ...]) -> Float[Array, "B u v D"]:
        side = -(-self.size // self.stride)
        coarsest, *finer = reversed(maps)
        x, level = Smooth(self.dim, name="level0")(coarsest), 1
        skips = [skip for skip in finer if skip.shape[1] <= side]
        for skip in skips:
            x = jnp.concatenate([self._up(x, skip.shape[1:3], level), skip.astype(x.dtype)], axis=-1)
            x, level = Smooth(self.dim, name=f"level{level}")(x), level + 1
        while x.shape[1] < side:
            x = self._up(x, (min(2 * x.shape[1], side), min(2 * x.shape[2], side)), level)
            x, level = Smooth(self.dim, name=f"level{level}")(x), level + 1
        return x

    def _up(self, x: Float[Array, "B h w D"], shape: tuple[int, int], level: int) -> Float[Array, "B u v D"]:
        """The map at a finer grid; one that has this grid already stays."""
        if x.shape[1:3] == tuple(shape):
            return x
        return Conv(self.dim, size=3, padding=1, kernel_init=HE, name=f"up{level}")(doubled(x, shape))
