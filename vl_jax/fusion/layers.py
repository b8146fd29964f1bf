"""What fusions of tokens share: towers at one width, with an embedding of each, and transformer layers."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vl_jax.encoders.transformer import BlockConfig, run_blocks
from vl_jax.fusion.streams import Stream, Streams, here
from vl_jax.nn.layers import LayerNorm, Linear, named

EMBEDDING_STD = 0.02


@dataclasses.dataclass(frozen=True)
class LayersConfig:
    """Transformer layers of a fusion."""

    dim: int = 256
    mlp_dim: int = 1024
    num_layers: int = 2
    num_heads: int = 4

    def __post_init__(self):
        if self.num_layers < 0:
            raise ValueError(f"num_layers={self.num_layers} of a fusion: must be >= 0")
        _ = self.block  # checks its own fields

    @property
    def block(self) -> BlockConfig:
        """As ``encoders.transformer`` reads it."""
        return BlockConfig(
            self.dim, self.mlp_dim, self.num_layers, self.num_heads, activation="gelu", norm_epsilon=1e-6
        )


Part = tuple[Float[Array, "B _ D"], Bool[Array, "B _"]]  # tokens of a modality, and which are there


class AtWidth(nn.Module):
    """Tokens of one tower at the width of the fusion, with an embedding that tells whose they are."""

    dim: int
    embedding: bool = True

    @nn.compact
    def __call__(self, tokens: Float[Array, "B S C"]) -> Float[Array, "B S D"]:
        x = Linear(self.dim, ("embed", None), True, name="width")(LayerNorm(name="norm")(tokens))
        if not self.embedding:
            return x
        init = named(nn.initializers.normal(EMBEDDING_STD), "embed")
        return x + self.param("embedding", init, (self.dim,)).astype(x.dtype)


class Layers(nn.Module):
    """Pre-norm transformer layers; a token sees those that are there."""

    config: LayersConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], mask: Bool[Array, "B S"]) -> Float[Array, "B S D"]:
        if not self.config.num_layers:
            return x
        return run_blocks(x, mask[:, None, :], self.config.block, owner=self)[0]


class Shared(nn.Module):
    """Layers over the tokens of all modalities, behind a class token that becomes their vector."""

    config: LayersConfig

    @nn.compact
    def __call__(self, parts: list[Part]) -> tuple[Stream, Float[Array, "B D"]]:
        """The tokens of all parts, one behind the other, and the vector.

        Args:
          parts: of each modality the tokens, and which of them are there.
        """
        rows, dtype = parts[0][1].shape[0], parts[0][0].dtype
        init = named(nn.initializers.normal(EMBEDDING_STD), "embed")
        token = self.param("class_token", init, (self.config.dim,)).astype(dtype)
        first = jnp.broadcast_to(token, (rows, 1, self.config.dim))
        x = jnp.concatenate([first, *(tokens for tokens, _ in parts)], axis=1)
        mask = jnp.concatenate([jnp.ones((rows, 1), bool), *(mask for _, mask in parts)], axis=1)
        x = LayerNorm(name="norm")(Layers(self.config, name="layers")(x, mask))
        return Stream(x[:, 1:], mask[:, 1:]), x[:, 0]


def join(streams: Streams, name: str, tokens: Stream, vector: Float[Array, "B D"]) -> Streams:
    """The streams and a further one of the tokens of all, whose vector is 0 for a row without any."""
    pooled = jnp.where(here(tokens)[:, None], vector, 0)
    return {**streams, name: dataclasses.replace(tokens, pooled=pooled)}
