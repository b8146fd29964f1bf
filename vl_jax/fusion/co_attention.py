"""Co-attention of two modalities, both ways (LXMERT, Tan and Bansal 2019, arXiv 1908.07490, section 2.2).

    a' = norm(a + cross(a, b))    a" = norm(a' + attention of a (a'))    a = norm(a" + feed-forward of a (a"))
    b' = norm(b + cross(b, a))    b" = norm(b' + attention of b (b'))    b = norm(b" + feed-forward of b (b"))

Both directions of ``cross`` share their weights, and both read what came out of the layer before. A row that
lacks one of the two leaves ``cross`` out: what is left is a transformer of the other alone.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vl_jax.encoders.transformer import Attention, feed_forward
from vl_jax.fusion.layers import AtWidth, LayersConfig, Part
from vl_jax.fusion.streams import Stream, Streams, filled
from vl_jax.nn.layers import LayerNorm


@dataclasses.dataclass(frozen=True)
class CoAttention:
    """Two towers look at one another in every layer."""

    pair: tuple[str, str] = ("text", "image")
    layers: LayersConfig = LayersConfig()
    name: str = "fused"  # of the tokens of both; those of one tower alone are in ``fused_text`` and so on

    reads_empty: ClassVar[bool] = True

    def streams(self, towers: tuple[str, ...]) -> tuple[str, ...]:
        """The towers, the fused stream, and both sides of it.

        Raises:
          ValueError: one of the pair is no tower, or is named twice.
        """
        for name in self.pair:
            if name not in towers or self.pair.count(name) > 1:
                known = ", ".join(towers)
                raise ValueError(f"fusion.pair={self.pair}: expected two different towers of {known}")
        return *towers, self.name, *(f"{self.name}_{name}" for name in self.pair)

    def build(self) -> nn.Module:
        """The module."""
        return BothWays(self)


class CoAttentionLayer(nn.Module):
    """One layer; it takes and gives the tokens of those of the pair that are there."""

    config: LayersConfig

    @nn.compact
    def __call__(self, sides: dict[str, Part]) -> dict[str, Part]:
        c = self.config
        crossed = {name: tokens for name, (tokens, _) in sides.items()}
        if len(sides) == 2:
            cross = Attention(c.num_heads, name="cross")
            norm = LayerNorm(c.block.norm_epsilon, name="cross_norm")
            for name, other in zip(sides, reversed(sides), strict=True):
                (x, _), (source, mask) = sides[name], sides[other]
                found = norm(x + cross(x, source, mask=mask[:, None, :]))
                crossed[name] = jnp.where(jnp.any(mask, axis=1)[:, None, None], found, x)
        return {name: (self._alone(crossed[name], mask, name), mask) for name, (_, mask) in sides.items()}

    def _alone(self, x: jax.Array, mask: jax.Array, name: str) -> jax.Array:
        """Self attention and feed-forward, of each modality its own."""
        c = self.config
        attend = Attention(c.num_heads, name=f"{name}_attention")
        x = x + attend(x, mask=mask[:, None, :])
        x = LayerNorm(c.block.norm_epsilon, name=f"{name}_attention_norm")(x)
        x = x + FeedForward(c, name=f"{name}_mlp")(x)
        return LayerNorm(c.block.norm_epsilon, name=f"{name}_mlp_norm")(x)


class FeedForward(nn.Module):
    """Two projections with an activation between them."""

    config: LayersConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return feed_forward(x, self.config.block)


class BothWays(nn.Module):
    """Adds the fused stream: the tokens of both, those of the first of the pair first."""

    config: CoAttention

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        c = self.config
        given = {name: streams[name] for name in c.pair if name in streams}
        sides: dict[str, Part] = {}
        for name, stream in (filled(given) or given).items():
            sides[name] = AtWidth(c.layers.dim, embedding=False, name=name)(stream.tokens), stream.mask
        for number in range(c.layers.num_layers):
            sides = CoAttentionLayer(c.layers, name=f"layer_{number}")(sides)
        tokens, mask = (jnp.concatenate(parts, axis=1) for parts in zip(*sides.values(), strict=True))
        found = {f"{c.name}_{name}": Stream(*side) for name, side in sides.items()}
        absent = Stream(tokens[:, :0], mask[:, :0])
        sides_of_both = {name: found.get(name, absent) for name in (f"{c.name}_{n}" for n in c.pair)}
        return {**streams, c.name: Stream(tokens, mask), **sides_of_both}
