"""The vision transformer: an image in, patch tokens out, and one vector for the whole image if asked for.

    image [h w c] -> stem -> patch grid [P D] (+ class token) + learned positions (-> pre_norm) -> blocks
      -> norm -> tokens, or chosen hidden states       the features that a language model sees
              -> pooling -> projection                 the image as one vector

One config covers SigLIP (arXiv 2303.15343), CLIP (2103.00020) and the first ViT (2010.11929). The ``patch``
stem is the published one, a single strided projection. The ``conv`` stem is five small strided convolutions
(Xiao et al. 2021, arXiv 2106.14881): it learns far faster from few images.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt8, UInt32

from vl_jax.batch import VISION
from vl_jax.encoders.transformer import (
    Attention,
    BlockConfig,
    Encoded,
    Through,
    feed_forward,
    routing_context,
    run_blocks,
)
from vl_jax.kernels.activation import FUNCTIONS, Kind
from vl_jax.moe.noise import content_of
from vl_jax.moe.routing import MoEConfig, State, scheme_of
from vl_jax.moe.stacks import Stack
from vl_jax.nn.conv import convolve
from vl_jax.nn.layers import LayerNorm, Linear, fan_in, named
from vl_jax.sharding import constrain

Sides = int | tuple[int, int]  # height and width, or one number for both
Levels = float | tuple[float, ...]  # by channel, or one number for all

# Functions that a projected vector may go through.
OUTPUTS = {"none": lambda x: x, "tanh": jnp.tanh, **FUNCTIONS}


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Defaults are SigLIP-SO400M-patch14-384 as DeepSeek-VL2 uses it."""

    image_size: Sides = 384  # pixels
    patch_size: Sides = 14  # pixels; a rest smaller than a patch is never seen
    num_channels: int = 3
    embed_dim: int = 1152
    mlp_dim: int = 4304
    num_layers: int = 27
    num_heads: int = 16
    activation: Kind = "gelu_tanh"
    norm_epsilon: float = 1e-6
    qkv_bias: bool = True
    stem: Literal["patch", "conv"] = "patch"
    stem_bias: bool = True  # of the patch stem
    class_token: bool = False  # a learned token before the patches
    pre_norm: bool = False  # one more norm before the first block (CLIP)
    final_norm: Literal["tokens", "pooled"] = "tokens"  # pooled: of the class token alone (CLIP)
    pooling: Literal["none", "class", "attention"] = "none"
    projection_dim: int = 0  # of the pooled vector; 0 leaves it as it is
    projection_bias: bool = False
    projection_activation: Literal["none", "tanh"] | Kind = "none"
    feature_layers: tuple[int, ...] = ()  # hidden states joined as features; 0 is what enters the first block
    class_feature: bool = False  # the class token is among the features
    pixel_mean: Levels = 0.5  # of pixel values scaled to 0..1
    pixel_std: Levels = 0.5
    moe: MoEConfig | None = None  # experts of the sparse blocks; every image is a routing group
    sparse_layers: tuple[int, ...] = ()  # numbers of the blocks with experts, ascending

    goes_through: ClassVar[bool] = True  # its module takes ``through``

    def __post_init__(self):
        (height, width), (rows, columns) = _pair(self.image_size), _pair(self.patch_size)
        if min(rows, columns) < 1 or height < rows or width < columns:
            raise ValueError(f"image_size={self.image_size} < patch_size={self.patch_size}")
        _ = self.block  # checks its own fields
        if self.moe is not None and scheme_of(self.moe).tokens:
            raise ValueError(
                f"moe.scheme={self.moe.scheme!r} routes by token ids, which pictures do not have; take one "
                "that routes by scores, such as 'top_k'"
            )
        if self.stem == "conv" and self.patch_size not in HALVINGS:
            raise ValueError(
                f"patch_size={self.patch_size}: the conv stem allows {', '.join(map(str, HALVINGS))}"
            )
        needs_class = {
            "pooling='class'": self.pooling == "class",
            "class_feature=True": self.class_feature,
        }
        for name, given in needs_class.items():
            if given and not self.class_token:
                raise ValueError(f"{name} needs class_token=True")
        if self.final_norm == "pooled" and self.pooling != "class":
            raise ValueError(f"final_norm='pooled' needs pooling='class', not {self.pooling!r}")
        if self.projection_dim and self.pooling == "none":
            raise ValueError(f"projection_dim={self.projection_dim} needs a pooling other than 'none'")
        for layer in self.feature_layers:
            if not -self.num_layers - 1 <= layer <= self.num_layers:
                raise ValueError(
                    f"feature_layers: {layer} is not one of the {self.num_layers + 1} hidden states"
                )

    @property
    def block(self) -> BlockConfig:
        return BlockConfig.of(self)

    @property
    def stack(self) -> Stack | None:
        """The sparse blocks, if there are any."""
        return self.block.stack

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        (height, width), (rows, columns) = _pair(self.image_size), _pair(self.patch_size)
        return height // rows, width // columns

    @property
    def grid(self) -> int:
        """Patches on the side of a tile.

        Raises:
          ValueError: the patches do not form a square.
        """
        rows, columns = self.grid_shape
        if rows != columns:
            raise ValueError(f"image_size={self.image_size} gives {rows} x {columns} patches, not a square")
        return rows

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of an image: height, width, channels."""
        return (*_pair(self.image_size), self.num_channels)

    @property
    def length(self) -> int:
        """Tokens in the blocks: patches, and the class token if there is one."""
        rows, columns = self.grid_shape
        return rows * columns + self.class_token

    @property
    def num_tokens(self) -> int:
        """Tokens given as features: patches, and the class token if it is among them."""
        rows, columns = self.grid_shape
        return rows * columns + self.class_feature

    @property
    def output_dim(self) -> int:
        """Width of a token: that of every layer whose hidden state is a feature."""
        return self.embed_dim * max(len(self.feature_layers), 1)

    @property
    def pooled_dim(self) -> int:
        """Width of an image as one vector: the pooled one, or the mean of the tokens where there is none."""
        return self.output_dim if self.pooling == "none" else self.projection_dim or self.embed_dim

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> ViT:
        """The module."""
        return ViT(self, jnp.dtype(dtype), remat)


def _pair(sides: Sides) -> tuple[int, int]:
    return (sides, sides) if isinstance(sides, int) else sides


def normalize(pixels: UInt8[Array, "*batch c"], *, mean: Levels, std: Levels) -> Float[Array, "*batch c"]:
    """Grey levels 0..255 to ``(v / 255 - mean) / std``; SigLIP's 0.5 and 0.5 give [-1, 1]."""
    shape = (1,) * (pixels.ndim - 1) + (-1,)
    shift, spread = (jnp.asarray(v, jnp.float32).reshape(shape) for v in (mean, std))
    return (pixels.astype(jnp.float32) / 255.0 - shift) / spread


def as_floats(
    pixels: UInt8[Array, "*batch c"] | Float[Array, "*batch c"], *, mean: Levels, std: Levels
) -> Float[Array, "*batch c"]:
    """Grey levels normalised; floats are normalised already, and stay as they are."""
    return normalize(pixels, mean=mean, std=std) if pixels.dtype == jnp.uint8 else pixels


class PatchStem(nn.Module):
    """Splits an image into non-overlapping patches and projects each."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "M h w c"]) -> Float[Array, "M P D"]:
        c = self.config
        (rows, columns), (height, width) = c.grid_shape, _pair(c.patch_size)
        shape = (height, width, c.num_channels, c.embed_dim)
        init = named(fan_in(in_axis=(0, 1, 2)), None, None, None, "embed", inputs=(0, 1, 2))
        kernel = self.param("kernel", init, shape).astype(x.dtype)
        patches = x[:, : rows * height, : columns * width].reshape(-1, rows, height, columns, width, shape[2])
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], rows * columns, -1)
        y = patches @ kernel.reshape(-1, c.embed_dim)
        if c.stem_bias:
            bias = self.param("bias", named(nn.initializers.zeros, "embed"), (c.embed_dim,))
            y = y + bias.astype(x.dtype)
        return y


# Of the initial position table: comparable to what a stem gives, so that place counts from the first step.
POSITION_STD = 0.3

# Halvings from pixels to patches; the remaining ones of the five convolutions keep the size.
HALVINGS = {4: 2, 8: 3, 16: 4}


class ConvStem(nn.Module):
    """Five 3x3 convolutions that end with one cell per patch; those that keep the size are residual."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "M h w c"]) -> Float[Array, "M P D"]:
        c = self.config
        (rows, columns), (height, width) = c.grid_shape, _pair(c.patch_size)
        x = x[:, : rows * height, : columns * width]
        for i in range(5):
            features = max(c.embed_dim >> max(0, 2 - i), 8)
            y = x if i == 0 else jax.nn.gelu(x, approximate=True)
            # Variance 2 / fan-in: an activation passes about half of it on.
            init = fan_in(in_axis=(0, 1, 2), scale=2.0)
            init = named(init, None, None, None, None, inputs=(0, 1, 2))
            kernel = self.param(f"kernel_{i}", init, (3, 3, x.shape[-1], features)).astype(x.dtype)
            bias = self.param(f"bias_{i}", named(nn.initializers.zeros, None), (features,)).astype(x.dtype)
            y = convolve(y, kernel, stride=2 if i < HALVINGS[height] else 1, padding=1) + bias
            x = x + y if y.shape == x.shape else y
        return x.reshape(x.shape[0], -1, x.shape[-1])


class AttentionPooler(nn.Module):
    """One learned probe attends to all tokens; then a residual feed-forward block (SigLIP)."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x: Float[Array, "M P D"]) -> Float[Array, "M D"]:
        c = self.config
        probe = self.param("probe", named(nn.initializers.normal(1.0), "embed"), (c.embed_dim,))
        query = jnp.broadcast_to(probe.astype(x.dtype), (x.shape[0], 1, c.embed_dim))
        y = Attention(c.num_heads, name="attention")(query, x)
        y = y + feed_forward(LayerNorm(c.norm_epsilon, name="norm")(y), c)
        return y[:, 0]


class ViT(nn.Module):
    """The encoder; calling it gives features, ``encode`` gives the final tokens."""

    config: ViTConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False

    def __call__(
        self,
        pixels: UInt8[Array, "M h w c"] | Float[Array, "M h w c"],
        valid: Bool[Array, " M"] | None = None,
        routing_state: State | None = None,
        content: UInt32[Array, " M"] | None = None,
        *,
        through: Through | None = None,
    ) -> Encoded:
        """As ``encode``, with the tokens that the config names as features, [M T F].

        F is D times the number of layers it joins.
        """
        encoded = self.encode(pixels, valid, routing_state, content, through=through)
        return dataclasses.replace(encoded, tokens=select_features(encoded, self.config))

    @nn.compact
    def encode(
        self,
        pixels: UInt8[Array, "M h w c"] | Float[Array, "M h w c"],
        valid: Bool[Array, " M"] | None = None,
        routing_state: State | None = None,
        content: UInt32[Array, " M"] | None = None,
        *,
        through: Through | None = None,
    ) -> Encoded:
        """Final tokens, the pooled vector and chosen hidden states.

        Args:
          pixels: grey levels, or floats that are normalised already.
          valid: images that are used; the tokens of others take no experts. None: all of them.
          routing_state: state of the scheme, stacked over the sparse blocks.
          content: a number of every picture, which the noise of routing follows; None: that of the pixels.
          through: acts between the blocks; see ``run_blocks``.
        """
        c = self.config
        x = self._embed(as_floats(pixels, mean=c.pixel_mean, std=c.pixel_std).astype(self.dtype))
        if c.pre_norm:
            x = LayerNorm(c.norm_epsilon, name="pre_norm")(x)
        x = constrain(x, "batch", None, None)
        valid = jnp.ones(x.shape[:1], bool) if valid is None else valid
        valid = jnp.broadcast_to(valid[:, None], x.shape[:2])
        if content is None and self.has_rng("routing"):
            content = content_of(pixels)
        x, states, routed = run_blocks(
            x,
            None,
            c.block,
            context=routing_context(valid, modality=VISION, content=content),
            routing_state=routing_state,
            states=c.feature_layers,
            remat=self.remat,
            through=through,
            owner=self,
        )
        norm = LayerNorm(c.norm_epsilon, name="norm")
        if c.final_norm == "tokens":
            x = norm(x)
        if c.pooling == "none":
            return Encoded(x, None, states, routed)
        if c.pooling == "attention":
            pooled = AttentionPooler(c.block, name="pooler")(x)
        else:
            pooled = norm(x[:, 0]) if c.final_norm == "pooled" else x[:, 0]
        if c.projection_dim:
            names = ("embed", None)
            pooled = Linear(c.projection_dim, names, use_bias=c.projection_bias, name="projection")(pooled)
        return Encoded(x, OUTPUTS[c.projection_activation](pooled), states, routed)

    def _embed(self, pixels: jax.Array) -> jax.Array:
        """Patches, with the class token before them, at their positions."""
        c = self.config
        x = ConvStem(c, name="stem")(pixels) if c.stem == "conv" else PatchStem(c, name="stem")(pixels)
        init = nn.initializers.normal(POSITION_STD)
        if c.class_token:
            token = self.param("class_token", named(init, "embed"), (c.embed_dim,)).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, c.embed_dim)), x], axis=1)
        positions = self.param("positions", named(init, None, "embed"), (c.length, c.embed_dim))
        x = x + positions.astype(x.dtype)
        self.sow("intermediates", "embedded", x)
        return x


def select_features(encoded: Encoded, config: ViTConfig) -> Float[Array, "M T F"]:
    """The final tokens, or the chosen hidden states joined feature by feature, in the order of the config."""
    x = jnp.concatenate(encoded.states, axis=-1) if config.feature_layers else encoded.tokens
    return x[:, 1:] if config.class_token and not config.class_feature else x
