"""Blocks whose attention stays in windows, every second of them in shifted ones, and the merging of cells.

    norm1 --zeros to whole windows--> --roll by -s--> windows --attention, offsets--> --roll by s--> --crop-->

A shift rolls the grid, so a window at the far edge joins cells of two ends: these do not see one another.
Cells of zeros, which fill the last windows, are seen, as in the published models.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vl_jax.encoders.sam import join, partition
from vl_jax.encoders.transformer import BlockConfig, feed_forward
from vl_jax.nn import attention, packed
from vl_jax.nn.layers import LayerNorm, Linear, fan_in, named
from vl_jax.sharding import constrain

STEM_EPSILON = 1e-5  # of the norms of patches and of merging, whatever that of the blocks is


def window_of(rows: int, columns: int, window: int) -> tuple[int, int]:
    """The side of the windows of a grid, and how far every second block shifts them.

    A grid with a side no longer than the window has windows of that side, and no shift.
    """
    shortest = min(rows, columns)
    return (shortest, 0) if shortest <= window else (window, window // 2)


def offset_bias(table: Float[Array, "y x N"], *, side: int) -> Float[Array, "N T T"]:
    """From a number per head and offset to one per (query, key) of a window of ``side`` x ``side`` cells.

    A table made for larger windows gives its middle.
    """
    line = np.arange(side)
    offsets = line[:, None] - line[None, :] + table.shape[0] // 2
    rows, columns = offsets[:, None, :, None], offsets[None, :, None, :]
    return jnp.moveaxis(table[rows, columns].reshape(side * side, side * side, -1), -1, 0)


def seen_in_shifted(rows: int, columns: int, *, side: int, shift: int) -> Bool[np.ndarray, "W T T"]:
    """Which cells of each window of a rolled grid were neighbours before, window by window."""

    def parts(length: int) -> np.ndarray:
        # What comes from the near end, behind the last whole window, and what was rolled to the far end.
        return np.repeat([0, 1, 2], [length - side, side - shift, shift])

    ids = 3 * parts(rows)[:, None] + parts(columns)[None, :]
    windows = ids.reshape(rows // side, side, columns // side, side).swapaxes(1, 2).reshape(-1, side * side)
    return windows[:, :, None] == windows[:, None, :]


class ShiftedAttention(nn.Module):
    """Attention among the cells of each window, with a learned number for every head and offset."""

    num_heads: int
    window: int  # cells on the side of the window that the table of offsets is made for
    qkv_bias: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "X s s D"], mask: Bool[np.ndarray, "W T T"] | None
    ) -> Float[Array, "X s s D"]:
        """Attends in windows; those of one picture stand together, and ``mask`` is for each of them."""
        count, side, _, dim = x.shape
        heads, width = self.num_heads, dim // self.num_heads
        init = named(fan_in(), "embed", None, "heads", None, inputs=(0,))
        kernel = self.param("qkv", init, (dim, 3, heads, width))
        qkv = jnp.einsum("XTD,DsNH->sXTNH", x.reshape(count, -1, dim), kernel.astype(x.dtype))
        if self.qkv_bias:
            init = named(nn.initializers.zeros, None, "heads", None)
            qkv = qkv + self.param("qkv_bias", init, (3, heads, width)).astype(x.dtype)[:, None, None]
        query, key, value = qkv
        offsets = 2 * self.window - 1
        init = named(nn.initializers.normal(0.02), None, None, "heads")
        table = self.param("offsets", init, (offsets, offsets, heads))
        scores = attention.dot_products(query, key) * width**-0.5
        scores = scores + offset_bias(table.astype(jnp.float32), side=side)
        seen = None if mask is None else jnp.tile(jnp.asarray(mask), (count // len(mask), 1, 1))[:, None]
        weights = attention.masked_softmax(scores, seen)
        self.sow("intermediates", "weights", weights)
        mixed = attention.weighted_sum(weights, value).reshape(x.shape)
        return Linear(dim, ("heads", "embed"), use_bias=True, name="project")(mixed)


class SwinBlock(nn.Module):
    """One pre-norm block; a shifted one rolls the grid before it is cut into windows."""

    config: BlockConfig
    window: int
    shifted: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "M u v D"], _: None = None) -> tuple[Float[Array, "M u v D"], None]:
        c, (rows, columns) = self.config, x.shape[1:3]
        side, shift = window_of(rows, columns, self.window)
        shift = shift if self.shifted else 0
        y = LayerNorm(c.norm_epsilon, name="norm1")(x)
        y = jnp.pad(y, ((0, 0), (0, -rows % side), (0, -columns % side), (0, 0)))
        padded = y.shape[1:3]
        mask = None
        if shift:
            y = jnp.roll(y, (-shift, -shift), axis=(1, 2))
            mask = seen_in_shifted(*padded, side=side, shift=shift)
        mix = ShiftedAttention(c.num_heads, self.window, c.qkv_bias, name="attention")
        y = join(mix(partition(y, window=side), mask), rows=padded[0], columns=padded[1])
        if shift:
            y = jnp.roll(y, (shift, shift), axis=(1, 2))
        x = x + y[:, :rows, :columns]
        y = feed_forward(LayerNorm(c.norm_epsilon, name="norm2")(x), c)
        return constrain(x + y, "batch", None, None, None), None


class BlockPair(nn.Module):
    """A block with windows as they lie, and one with shifted windows."""

    config: BlockConfig
    window: int

    @nn.compact
    def __call__(self, x: Float[Array, "M u v D"], _: None = None) -> tuple[Float[Array, "M u v D"], None]:
        x, _ = SwinBlock(self.config, self.window, name="plain")(x)
        return SwinBlock(self.config, self.window, shifted=True, name="shifted")(x)


def stacks_of(blocks: int) -> dict[str, tuple[int, ...]]:
    """The stacks of a stage's blocks by their names, and the numbers of the blocks in each."""
    even, odd = tuple(range(0, blocks - 1, 2)), tuple(range(1, blocks, 2))
    found = {"pairs/plain": even, "pairs/shifted": odd, "last": (blocks - 1,) if blocks % 2 else ()}
    return {name: numbers for name, numbers in found.items() if numbers}


class PatchMerging(nn.Module):
    """Four neighbouring cells become one of twice their width; an odd grid is filled with zeros."""

    @nn.compact
    def __call__(self, x: Float[Array, "M u v D"]) -> Float[Array, "M p q E"]:
        _, rows, columns, width = x.shape
        x = jnp.pad(x, ((0, 0), (0, rows % 2), (0, columns % 2), (0, 0)))
        # In this order: a column of the 2 x 2 cells after the other.
        x = jnp.concatenate([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], axis=-1)
        x = LayerNorm(STEM_EPSILON, name="norm")(x)
        return Linear(2 * width, ("embed", "mlp"), name="reduce")(x)


class SwinStage(nn.Module):
    """Blocks of one width, and their merging if another stage follows."""

    config: BlockConfig
    window: int
    merges: bool
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "M u v D"]) -> tuple[Float[Array, "M p q E"], Float[Array, "M u v D"]]:
        """What the next stage gets, and the cells before they are merged."""
        blocks = self.config.num_layers
        for layer, name, length in ((BlockPair, "pairs", blocks // 2), (SwinBlock, "last", blocks % 2)):
            if not length:
                continue
            stack = nn.scan(
                packed.layer_of(layer, self, name, remat=self.remat),
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                length=length,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = stack(self.config, self.window, name=name)(x, None)
        return (PatchMerging(name="merge")(x) if self.merges else x), x
