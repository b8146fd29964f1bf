"""The image encoder of SAM (Kirillov et al. 2023, arXiv 2304.02643): pixels in, a grid of features out.

    pixels [h w c] --> cells [u v D] (+ learned positions) --> layers --> neck [u v W]

Most layers attend within windows, a few within the whole grid. The two kinds do not have the same parameters,
for positions enter through tables of offsets (Li et al. 2022, arXiv 2112.01526, eq. 4), so consecutive layers
of one kind are stacked and scanned.
"""

from __future__ import annotations

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt8

from vl_jax.encoders.transformer import Encoded, from_grid
from vl_jax.encoders.vit import Levels, as_floats
from vl_jax.kernels.activation import Activation, Kind
from vl_jax.moe.routing import State
from vl_jax.moe.stacks import Stack
from vl_jax.nn import attention, packed
from vl_jax.nn.conv import Conv
from vl_jax.nn.layers import GatedMLP, LayerNorm, Linear, fan_in, named
from vl_jax.params import Leaf
from vl_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class WindowRun:
    """Consecutive layers of one kind, whose parameters are stacked under one name."""

    name: str
    window: int  # cells on the side of a window; 0: the whole grid
    layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class SAMConfig:
    """Defaults are SAM-B."""

    image_size: int = 1024  # pixels on the side
    patch_size: int = 16  # pixels on the side of a cell; a rest smaller than a cell is never seen
    embed_dim: int = 768
    mlp_dim: int = 3072
    output_dim: int = 256  # channels after the neck
    num_layers: int = 12
    num_heads: int = 12
    window: int = 14  # cells on the side of a window; 0: every layer attends within the whole grid
    global_layers: tuple[int, ...] = (2, 5, 8, 11)  # layers that attend within the whole grid all the same
    absolute_positions: bool = True
    relative_positions: bool = True
    qkv_bias: bool = True
    activation: Kind = "gelu"
    norm_epsilon: float = 1e-6  # of the layers; the neck has its own
    pixel_mean: Levels = (0.485, 0.456, 0.406)  # of pixel values scaled to 0..1
    pixel_std: Levels = (0.229, 0.224, 0.225)

    def __post_init__(self):
        if not 0 < self.patch_size <= self.image_size:
            raise ValueError(f"patch_size={self.patch_size} must be from 1 to image_size={self.image_size}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim={self.embed_dim} is not a multiple of num_heads={self.num_heads}")
        if self.window < 0:
            raise ValueError(f"window={self.window} must be >= 0 (0: the whole grid)")
        if not all(0 <= i < self.num_layers for i in self.global_layers):
            raise ValueError(f"global_layers={self.global_layers} must be from 0 to {self.num_layers - 1}")

    @property
    def grid(self) -> int:
        """Cells on the side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Cells of the image."""
        return self.grid**2

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of an image: height, width, channels."""
        return self.image_size, self.image_size, 3

    @property
    def stack(self) -> Stack | None:
        """There are no sparse layers."""
        return None

    @property
    def runs(self) -> tuple[WindowRun, ...]:
        """The layers in order; from the second run of a kind on, a number follows its name.

        A run ends with the first of ``global_layers``, whose output is one of the encoder's results.
        """
        is_global = [self.window == 0 or i in self.global_layers for i in range(self.num_layers)]
        seen = [bool(self.global_layers) and i > self.global_layers[0] for i in range(self.num_layers)]
        runs: list[WindowRun] = []
        for (whole, _), group in itertools.groupby(
            range(self.num_layers), key=lambda i: (is_global[i], seen[i])
        ):
            kind, window = ("global_layers", 0) if whole else ("window_layers", self.window)
            earlier = sum(run.window == window for run in runs)
            runs.append(WindowRun(f"{kind}_{earlier}" if earlier else kind, window, tuple(group)))
        return tuple(runs)

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> SAM:
        """The module."""
        return SAM(self, jnp.dtype(dtype), remat)


@struct.dataclass
class SAMOutput:
    """What the encoder sees."""

    features: Leaf  # [M u v W] after the neck
    first_global: Leaf | None  # [M u v D] after the first of ``global_layers``; None where there are none


def partition(x: Float[Array, "M u v D"], *, window: int) -> Float[Array, "X s s D"]:
    """Cuts grids into square windows, in reading order, after padding with zeros right and below."""
    images, rows, columns, width = x.shape
    x = jnp.pad(x, ((0, 0), (0, -rows % window), (0, -columns % window), (0, 0)))
    x = x.reshape(images, x.shape[1] // window, window, -1, window, width)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, window, window, width)


def join(windows: Float[Array, "X s s D"], *, rows: int, columns: int) -> Float[Array, "M u v D"]:
    """The inverse of ``partition``: grids of rows x columns, without the padding."""
    window, width = windows.shape[2:]
    down, across = -(-rows // window), -(-columns // window)
    x = windows.reshape(-1, down, across, window, window, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, down * window, across * window, width)[:, :rows, :columns]


def offset_table(table: Float[Array, "Z H"], *, size: int) -> Float[Array, "S S H"]:
    """From a vector per offset to one per (query, key) on a line of ``size`` cells.

    A table made for another size is stretched by linear interpolation to the 2 * size - 1 offsets there are.
    """
    offsets = 2 * size - 1
    if table.shape[0] != offsets:
        table = jax.image.resize(table, (offsets, table.shape[1]), "linear", antialias=False)
    line = jnp.arange(size)
    return table[line[:, None] - line[None, :] + size - 1]


def with_offsets(
    query: Float[Array, "M u v N H"],
    key: Float[Array, "M u v N H"],
    rows: Float[Array, "y H"],
    columns: Float[Array, "x H"],
) -> tuple[Float[Array, "M T N K"], Float[Array, "M T N K"]]:
    """Queries and keys of flattened cells whose product is ``query . key / sqrt(H) + relative positions``.

    Relative positions score ``query . (rows[i - i'] + columns[j - j'])`` for a query at (i, j) and a key at
    (i', j'). A query's products with all offsets become further components of it, and a key has ones at its
    own row and column. So attention needs no bias of the size of the scores.
    """
    images, u, v, heads, width = query.shape
    by_row = jnp.einsum("MuvNH,ukH->MuvNk", query, offset_table(rows, size=u).astype(query.dtype))
    by_column = jnp.einsum("MuvNH,vkH->MuvNk", query, offset_table(columns, size=v).astype(query.dtype))
    cells = (images, u, v, heads)
    own_row = jnp.broadcast_to(jnp.eye(u, dtype=key.dtype)[None, :, None, None], (*cells, u))
    own_column = jnp.broadcast_to(jnp.eye(v, dtype=key.dtype)[None, None, :, None], (*cells, v))
    query = jnp.concatenate([query * width**-0.5, by_row, by_column], axis=-1)
    key = jnp.concatenate([key, own_row, own_column], axis=-1)
    flat = (images, u * v, heads, -1)
    return query.reshape(flat), key.reshape(flat)


class WindowAttention(nn.Module):
    """Attention among all cells of a grid (or of a window, which is a small grid)."""

    config: SAMConfig
    side: int  # cells on the side of the grid that the tables of offsets are made for

    @nn.compact
    def __call__(self, x: Float[Array, "M u v D"]) -> Float[Array, "M u v D"]:
        c = self.config
        heads, width = c.num_heads, c.embed_dim // c.num_heads
        init = named(fan_in(), "embed", None, "heads", None, inputs=(0,))
        kernel = self.param("qkv", init, (c.embed_dim, 3, heads, width))
        qkv = jnp.einsum("MuvD,DsNH->sMuvNH", x, kernel.astype(x.dtype))
        if c.qkv_bias:
            init = named(nn.initializers.zeros, None, "heads", None)
            bias = self.param("qkv_bias", init, (3, heads, width)).astype(x.dtype)
            qkv = qkv + bias[:, None, None, None]
        query, key, value = qkv
        flat = (x.shape[0], x.shape[1] * x.shape[2], heads, width)
        scale = 1.0
        if c.relative_positions:
            init, shape = named(nn.initializers.zeros, None, None), (2 * self.side - 1, width)
            rows, columns = self.param("rows", init, shape), self.param("columns", init, shape)
            query, key = with_offsets(query, key, rows, columns)
        else:
            query, key, scale = query.reshape(flat), key.reshape(flat), width**-0.5
        mixed = attention.attend(query, key, value.reshape(flat), mask=None, scale=scale)
        if self.is_mutable_collection("intermediates"):
            weights = attention.attention_weights(query, key, mask=None, scale=scale)
            self.sow("intermediates", "weights", weights)
        project = Linear(c.embed_dim, ("heads", "embed"), use_bias=True, name="project")
        return project(mixed.reshape(x.shape))


class Layer(nn.Module):
    """Pre-norm transformer layer; ``window`` 0 attends within the whole grid."""

    config: SAMConfig
    window: int

    @nn.compact
    def __call__(self, x: Float[Array, "M u v D"], _: None) -> tuple[Float[Array, "M u v D"], None]:
        c = self.config
        normed = LayerNorm(c.norm_epsilon, name="norm1")(x)
        mix = WindowAttention(c, self.window or c.grid, name="attention")
        if self.window:
            # The padding is attended to, as in the published model: after the norm, so its cells are zero.
            mixed = mix(partition(normed, window=self.window))
            x = x + join(mixed, rows=x.shape[1], columns=x.shape[2])
        else:
            x = x + mix(normed)
        normed = LayerNorm(c.norm_epsilon, name="norm2")(x)
        mlp = GatedMLP(c.mlp_dim, Activation(c.activation, gated=False), use_bias=True, name="mlp")
        return constrain(x + mlp(normed), "batch", None, None, None), None


class Neck(nn.Module):
    """To ``output_dim`` channels, by a 1x1 and a 3x3 convolution, each with a norm after it."""

    output_dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "M u v D"]) -> Float[Array, "M u v W"]:
        x = LayerNorm(name="norm1")(Conv(self.output_dim, size=1, name="conv1")(x))
        return LayerNorm(name="norm2")(Conv(self.output_dim, size=3, padding=1, name="conv2")(x))


class SAM(nn.Module):
    """The encoder. Without absolute positions pixels may be of any size."""

    config: SAMConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False

    def __call__(
        self,
        pixels: UInt8[Array, "M h w c"] | Float[Array, "M h w c"],
        valid: Bool[Array, " M"] | None = None,
        routing_state: State | None = None,
    ) -> Encoded:
        """The features after the neck as tokens, row by row, and their mean. No layer is sparse."""
        return from_grid(self.stages(pixels).features)

    @nn.compact
    def stages(self, pixels: UInt8[Array, "M h w c"] | Float[Array, "M h w c"]) -> SAMOutput:
        """The features as grids.

        Args:
          pixels: grey levels, or floats that are normalised already.

        Raises:
          ValueError: the pixels do not fit the learned positions.
        """
        c = self.config
        pixels = as_floats(pixels, mean=c.pixel_mean, std=c.pixel_std)
        stem = Conv(c.embed_dim, size=c.patch_size, stride=c.patch_size, use_bias=True, name="stem")
        x = stem(pixels.astype(self.dtype))
        if c.absolute_positions:
            if x.shape[1:3] != (c.grid, c.grid):
                raise ValueError(
                    f"pixels of {pixels.shape[1]} x {pixels.shape[2]} must be of image_size={c.image_size}"
                )
            init = named(nn.initializers.normal(0.02), None, None, "embed")
            x = x + self.param("positions", init, (c.grid, c.grid, c.embed_dim)).astype(x.dtype)
        x = constrain(x, "batch", None, None, None)
        first_global = None
        for run in c.runs:
            layers = nn.scan(
                packed.layer_of(Layer, self, run.name, remat=self.remat),
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                length=len(run.layers),
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = layers(c, run.window, name=run.name)(x, None)
            if run.layers[-1] in c.global_layers[:1]:
                first_global = x
        return SAMOutput(Neck(c.output_dim, name="neck")(x), first_global)
