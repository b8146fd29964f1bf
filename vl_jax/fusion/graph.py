"""A graph over modalities: one node each, and messages along edges that know whom they join.

    node  --norm, width-->  h_i          vector of a tower
    score(i <- j) = q_i . (k_j + key of the edge)          softmax over the modalities that are there
    h_i += sum_j weight(i <- j) (v_j + value of the edge),  then a feed-forward block

The queries, keys and values of nodes are those of all modalities; an edge has a type, the ordered pair of its
modalities, with a vector of its own for keys and for values (as relative positions have in Shaw et al. 2018,
arXiv 1803.02155).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vl_jax.encoders.transformer import feed_forward
from vl_jax.fusion.layers import EMBEDDING_STD, AtWidth, LayersConfig
from vl_jax.fusion.streams import Stream, Streams, filled, here, pool
from vl_jax.nn.layers import LayerNorm, fan_in, named


@dataclasses.dataclass(frozen=True)
class Graph:
    """The towers' vectors learn from one another."""

    layers: LayersConfig = LayersConfig()
    name: str = "fused"  # of the stream that comes of it

    reads_empty: ClassVar[bool] = True

    def streams(self, towers: tuple[str, ...]) -> tuple[str, ...]:
        """The towers, and the fused stream."""
        return *towers, self.name

    def build(self) -> nn.Module:
        """The module."""
        return GraphOfModalities(self)


def pass_messages(
    query: Float[Array, "B I N H"],
    key: Float[Array, "B I N H"],
    value: Float[Array, "B I N H"],
    *,
    edge_keys: Float[Array, "I I N H"],
    edge_values: Float[Array, "I I N H"],
    present: Bool[Array, "B I"],
) -> Float[Array, "B I N H"]:
    """What every node hears from those that are there; first node axis of edges: the one that hears."""
    scale = query.shape[-1] ** -0.5
    scores = jnp.einsum("BINH,BJNH->BNIJ", query, key) + jnp.einsum("BINH,IJNH->BNIJ", query, edge_keys)
    scores = jnp.where(present[:, None, None, :], scores.astype(jnp.float32) * scale, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("BNIJ,BJNH->BINH", weights, value) + jnp.einsum("BNIJ,IJNH->BINH", weights, edge_values)


class MessageLayer(nn.Module):
    """One round of messages, and a feed-forward block."""

    config: LayersConfig
    names: tuple[str, ...]  # of the nodes

    @nn.compact
    def __call__(self, x: Float[Array, "B I D"], present: Bool[Array, "B I"]) -> Float[Array, "B I D"]:
        c, width = self.config, self.config.dim // self.config.num_heads
        normed = LayerNorm(name="norm1")(x)
        init = named(fan_in(), "embed", None, "heads", None, inputs=(0,))
        kernel = self.param("qkv", init, (c.dim, 3, c.num_heads, width)).astype(x.dtype)
        query, key, value = jnp.einsum("BID,DXNH->XBINH", normed, kernel)
        heard = pass_messages(
            query,
            key,
            value,
            edge_keys=self._edges("key", x.dtype),
            edge_values=self._edges("value", x.dtype),
            present=present,
        )
        init = named(fan_in(in_axis=(0, 1)), "heads", None, "embed", inputs=(0, 1))
        out = self.param("project", init, (c.num_heads, width, c.dim)).astype(x.dtype)
        x = x + jnp.einsum("BINH,NHD->BID", heard, out)
        return x + feed_forward(LayerNorm(name="norm2")(x), c.block)

    def _edges(self, kind: str, dtype: jax.typing.DTypeLike) -> Float[Array, "I I N H"]:
        """The vectors of all edges, of which every ordered pair of modalities has its own."""
        c = self.config
        shape = (c.num_heads, c.dim // c.num_heads)
        init = named(nn.initializers.normal(EMBEDDING_STD), "heads", None)

        def edge(to: str, source: str) -> jax.Array:
            return self.param(f"{kind}_{to}_from_{source}", init, shape).astype(dtype)

        return jnp.stack([jnp.stack([edge(to, source) for source in self.names]) for to in self.names])


class GraphOfModalities(nn.Module):
    """Adds the fused stream: a token a node, and the mean of those that are there as its vector."""

    config: Graph

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        c = self.config
        seen = filled(streams) or dict(list(streams.items())[:1])
        nodes = [AtWidth(c.layers.dim, name=name)(pool(stream)[:, None]) for name, stream in seen.items()]
        x = jnp.concatenate(nodes, axis=1)
        present = jnp.stack([here(stream) for stream in seen.values()], axis=1)
        for number in range(c.layers.num_layers):
            x = MessageLayer(c.layers, tuple(seen), name=f"layer_{number}")(x, present)
        fused = Stream(LayerNorm(name="norm")(x), present)
        return {**streams, c.name: dataclasses.replace(fused, pooled=pool(fused))}
