"""From patch tokens to the width of the language model: pixel shuffle, projector, and the visual table.

    patch tokens [M P W] --skip--> --pixel shuffle--> [M n 4W] --MLP--> tile tokens [M n D]
    [M * n tile tokens | newline | separator] --visual_index--> visual tokens of a row, in reading order

The table is explained in ``batch.py``. In LLaVA and DeepSeek-VL nothing is shuffled, and the tokens of an
image stand one after the other, without vectors between them.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vl_jax.kernels.activation import FUNCTIONS, Kind
from vl_jax.nn.layers import Linear, named
from vl_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The projector; defaults are DeepSeek-VL2's (``downsample_mlp_gelu``)."""

    downsample: int = 2  # side of the window of patches that becomes one token
    num_layers: int = 2  # 0 passes patches on as they are, 1 is a linear map
    mlp_ratio: int = 1  # hidden width as a multiple of the language model's
    activation: Kind = "gelu"  # between layers
    use_bias: bool = True
    skip: int = 0  # leading tokens of the encoder that are left out, such as a class token
    separators: bool = True  # learned vectors, newline and separator, may stand among the tokens

    def __post_init__(self):
        if min(self.downsample, self.mlp_ratio) < 1 or min(self.num_layers, self.skip) < 0:
            raise ValueError(
                f"downsample={self.downsample}, mlp_ratio={self.mlp_ratio}: must be >= 1, num_layers="
                f"{self.num_layers}, skip={self.skip}: >= 0"
            )

    def tokens_side(self, grid: int) -> int:
        """Tokens on the side of a tile whose patch grid has ``grid`` patches on a side."""
        return -(-grid // self.downsample)


def pixel_shuffle(patches: Float[Array, "M P W"], *, ratio: int) -> Float[Array, "M n F"]:
    """Joins windows of ratio x ratio patches into one token, after zero-padding bottom and right.

    Features inside a window are channel-major: ``channel * ratio**2 + row * ratio + column``. Tokens need not
    form a square where the ratio is 1.
    """
    if ratio == 1:
        return patches
    tiles, count, width = patches.shape
    side = round(count**0.5)
    padding = -side % ratio
    grid = patches.reshape(tiles, side, side, width)
    grid = jnp.pad(grid, ((0, 0), (0, padding), (0, padding), (0, 0)))
    cells = (side + padding) // ratio
    grid = grid.reshape(tiles, cells, ratio, cells, ratio, width).transpose(0, 1, 3, 5, 2, 4)
    return grid.reshape(tiles, cells * cells, width * ratio * ratio)


def gather_visual(
    tile_tokens: Float[Array, "B M n D"],
    extra: Float[Array, "X D"],
    visual_index: Int[Array, "B S"],
) -> Float[Array, "B S D"]:
    """Lays out a row's visual tokens in reading order (see ``batch.py``); padding becomes zero.

    Args:
      extra: learned vectors that end the table: newline and separator, or none.
    """
    batch, _, _, width = tile_tokens.shape
    extra = jnp.broadcast_to(extra, (batch, *extra.shape))
    table = jnp.concatenate([tile_tokens.reshape(batch, -1, width), extra], axis=1)
    tokens = jnp.take_along_axis(table, jnp.maximum(visual_index, 0)[..., None], axis=1)
    return jnp.where((visual_index >= 0)[..., None], tokens, 0)


class Adapter(nn.Module):
    """Pixel shuffle and MLP, plus the learned vectors that may stand among the tokens."""

    config: AdapterConfig
    embed_dim: int

    def setup(self):
        c = self.config
        widths = [
            *[self.embed_dim * c.mlp_ratio] * (c.num_layers - 1),
            *[self.embed_dim] * (c.num_layers > 0),
        ]
        last = len(widths) - 1
        self.layer = [
            Linear(width, ("mlp", "embed") if i == last else ("embed", "mlp"), use_bias=c.use_bias)
            for i, width in enumerate(widths)
        ]
        if c.separators:
            init = named(nn.initializers.normal(self.embed_dim**-0.5), None)
            self.newline = self.param("newline", init, (self.embed_dim,))
            self.separator = self.param("separator", init, (self.embed_dim,))

    def project(self, patches: Float[Array, "M P W"]) -> Float[Array, "M n D"]:
        """The tokens of every tile."""
        c = self.config
        x = pixel_shuffle(patches[:, c.skip :], ratio=c.downsample)
        for i, layer in enumerate(self.layer):
            if i:
                x = FUNCTIONS[c.activation](x)
                self.sow("intermediates", "hidden", x)
            x = layer(x)
        return x

    def __call__(
        self, patches: Float[Array, "B M P W"], visual_index: Int[Array, "B S"]
    ) -> Float[Array, "B S D"]:
        batch, tiles = patches.shape[:2]
        x = self.project(patches.reshape(batch * tiles, *patches.shape[2:]))
        tile_tokens = x.reshape(batch, tiles, -1, self.embed_dim)
        extra = jnp.zeros((0, self.embed_dim), x.dtype)
        if self.config.separators:
            extra = jnp.stack([self.newline, self.separator]).astype(x.dtype)
        return constrain(gather_visual(tile_tokens, extra, visual_index), "batch", None, None)


def used_tiles(visual_index: Int[Array, "B S"], *, tiles: int, tile_tokens: int) -> Bool[Array, "B M"]:
    """The tiles that some visual token of their row is taken from."""
    source = visual_index // tile_tokens  # -1 for padding; the vectors behind the tiles are past the last
    return jnp.any(source[:, :, None] == jnp.arange(tiles), axis=1)


def merge_visual(
    x: Float[Array, "B T D"], vision: Float[Array, "B S D"], visual_slot: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Puts visual token ``visual_slot`` where it is set, the text embedding elsewhere."""
    index = jnp.maximum(visual_slot, 0)[..., None]
    placed = jnp.take_along_axis(vision, index, axis=1)
    return jnp.where(visual_slot[..., None] >= 0, placed.astype(x.dtype), x)
