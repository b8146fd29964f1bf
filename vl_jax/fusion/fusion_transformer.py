"""One transformer over the tokens of all modalities, behind a class token.

image tokens --norm, width--> + embedding of the modality --.
text tokens  --norm, width--> + embedding of the modality --+-- class token first --> layers --> norm
...                                                       --'
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn

from vl_jax.fusion.layers import AtWidth, LayersConfig, Shared, join
from vl_jax.fusion.streams import Streams, filled


@dataclasses.dataclass(frozen=True)
class FusionTransformer:
    """Tokens of all towers see one another in every layer."""

    layers: LayersConfig = LayersConfig()
    name: str = "fused"  # of the stream that comes of it

    reads_empty: ClassVar[bool] = True

    def streams(self, towers: tuple[str, ...]) -> tuple[str, ...]:
        """The towers, and the fused stream."""
        return *towers, self.name

    def build(self) -> nn.Module:
        """The module."""
        return TogetherFromTheStart(self)


class TogetherFromTheStart(nn.Module):
    """Adds the fused stream: the tokens of all towers, and the class token as its vector."""

    config: FusionTransformer

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        c = self.config
        # Of towers without room for tokens the first stands in where there is no other: it adds none.
        seen = filled(streams) or dict(list(streams.items())[:1])
        parts = [(AtWidth(c.layers.dim, name=name)(s.tokens), s.mask) for name, s in seen.items()]
        return join(streams, c.name, *Shared(c.layers, name="shared")(parts))
