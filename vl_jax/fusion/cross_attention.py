"""One vector looks at the tokens of another tower: what in the picture is what the words speak of.

    vector of the text --norm, width, + probe--> query --attention over picture tokens--> what it found
    fused = vector of the text, at the same width, + what it found

A row without a text looks with the probe alone, a learned query; one without a picture finds nothing. How
alike two vectors are is for a head to say: ``Pairs`` reads ``found`` and the text.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vl_jax.fusion.layers import EMBEDDING_STD
from vl_jax.fusion.streams import Stream, Streams, add_vector, here, pool
from vl_jax.nn import attention
from vl_jax.nn.layers import LayerNorm, Linear, fan_in, join_heads, named, split_heads


@dataclasses.dataclass(frozen=True)
class CrossAttention:
    """The reader's vector attends to the tokens of the source."""

    reader: str = "text"  # the tower whose vector looks
    source: str = "image"  # the tower whose tokens are looked at
    dim: int = 256
    num_heads: int = 4
    name: str = "fused"  # of the stream of both together
    found: str = "found"  # of the stream of what the reader found, alone

    reads_empty: ClassVar[bool] = True

    def __post_init__(self):
        if self.num_heads < 1 or self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} of CrossAttention is not a multiple of {self.num_heads} heads")

    def streams(self, towers: tuple[str, ...]) -> tuple[str, ...]:
        """The towers, the fused stream, and what was found.

        Raises:
          ValueError: the reader or the source is no tower.
        """
        for field in ("reader", "source"):
            if getattr(self, field) not in towers:
                known = ", ".join(towers)
                raise ValueError(f"fusion.{field}={getattr(self, field)!r} is no tower; there are: {known}")
        return *towers, self.name, self.found

    def build(self) -> nn.Module:
        """The module."""
        return VectorLooks(self)


class VectorLooks(nn.Module):
    """Adds both streams."""

    config: CrossAttention

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        c = self.config
        given = {name: s for name, s in streams.items() if name in (c.reader, c.source)}
        reader, source = (_with_room(given.get(name)) for name in (c.reader, c.source))
        some = next(iter(streams.values()))
        rows, dtype = some.mask.shape[0], some.tokens.dtype
        fused = found = jnp.zeros((rows, c.dim), dtype)
        if reader is not None:
            x = Linear(c.dim, ("embed", None), name="width")(LayerNorm(name="norm")(pool(reader)))
            fused = jnp.where(here(reader)[:, None], x, 0)
        if source is not None:
            found = self._look(fused, source)
        both = add_vector(given or streams, c.name, fused + found)[c.name]
        alone = add_vector({} if source is None else {c.source: source}, c.found, found)[c.found]
        return {**streams, c.name: both, c.found: alone}

    def _look(self, reading: Float[Array, "B D"], source: Stream) -> Float[Array, "B D"]:
        c = self.config
        probe = self.param("probe", named(nn.initializers.normal(EMBEDDING_STD), "embed"), (c.dim,))
        shape = (c.num_heads, c.dim // c.num_heads)
        init = named(fan_in(), "embed", "heads", None, inputs=(0,))
        tokens = LayerNorm(name="source_norm")(source.tokens)
        width, dtype = tokens.shape[-1], tokens.dtype
        key = split_heads(tokens, self.param("key", init, (width, *shape)).astype(dtype))
        value = split_heads(tokens, self.param("value", init, (width, *shape)).astype(dtype))
        asked = (reading + probe.astype(dtype))[:, None]
        query = split_heads(asked, self.param("query", init, (c.dim, *shape)).astype(dtype))
        seen = attention.attend(query, key, value, mask=source.mask[:, None, :], scale=shape[1] ** -0.5)
        init = named(fan_in(in_axis=(0, 1)), "heads", None, "embed", inputs=(0, 1))
        return join_heads(seen, self.param("output", init, (*shape, c.dim)).astype(dtype))[:, 0]


def _with_room(stream: Stream | None) -> Stream | None:
    return stream if stream is not None and stream.tokens.shape[1] else None
