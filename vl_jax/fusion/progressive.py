"""Progressive fusion: shallow layers of each modality, then deep layers that all share.

    image tokens --> layers of image --.
    text tokens  --> layers of text  --+-- class token first --> shared layers --> norm
    ...                              --'

With no layers of their own it is the fusion transformer.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn

from vl_jax.fusion.layers import AtWidth, Layers, LayersConfig, Shared, join
from vl_jax.fusion.streams import Streams, filled


@dataclasses.dataclass(frozen=True)
class Progressive:
    """Tokens of a tower see one another first, then those of all towers."""

    layers: LayersConfig = LayersConfig()  # that all share
    shallow: int = 1  # layers of each modality before
    name: str = "fused"  # of the stream that comes of it

    reads_empty: ClassVar[bool] = True

    def __post_init__(self):
        if self.shallow < 0:
            raise ValueError(f"shallow={self.shallow} of Progressive: must be >= 0")

    def streams(self, towers: tuple[str, ...]) -> tuple[str, ...]:
        """The towers, and the fused stream."""
        return *towers, self.name

    def build(self) -> nn.Module:
        """The module."""
        return FirstApart(self)


class FirstApart(nn.Module):
    """Adds the fused stream: the tokens of all towers, and the class token as its vector."""

    config: Progressive

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        c = self.config
        own = dataclasses.replace(c.layers, num_layers=c.shallow)
        seen, parts = filled(streams) or dict(list(streams.items())[:1]), []
        for name, stream in seen.items():
            x = AtWidth(c.layers.dim, name=name)(stream.tokens)
            parts.append((Layers(own, name=f"{name}_layers")(x, stream.mask), stream.mask))
        return join(streams, c.name, *Shared(c.layers, name="shared")(parts))
