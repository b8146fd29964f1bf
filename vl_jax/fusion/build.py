"""Fusions of a joint model, by config: from the streams of its towers to those that its heads read."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, Protocol, runtime_checkable

import flax.linen as nn

from vl_jax.fusion.between_layers import BetweenLayers
from vl_jax.fusion.co_attention import CoAttention
from vl_jax.fusion.cross_attention import CrossAttention
from vl_jax.fusion.fusion_transformer import FusionTransformer
from vl_jax.fusion.gated_streams import GatedStreams
from vl_jax.fusion.graph import Graph
from vl_jax.fusion.mixing import Mixing
from vl_jax.fusion.progressive import Progressive
from vl_jax.fusion.spatio_temporal import SpatioTemporal
from vl_jax.schema import Open


@runtime_checkable
class Fusion(Protocol):
    """What the config of a fusion has to have; its module maps ``Streams`` to ``Streams``.

    One that can do with streams without tokens has ``reads_empty = True``: then a batch in which no row has
    what a tower reads is computed without the tower. One that draws at random in training names the random
    streams in ``draws``. One that acts between the layers of the towers has ``placement = "between_layers"``
    (see ``between_layers``).
    """

    def build(self) -> nn.Module:
        """The module."""
        ...

    def streams(self, towers: tuple[str, ...]) -> tuple[str, ...]:
        """The names of the streams it gives, from those of the towers.

        Raises:
          ValueError: it needs a tower that is not there.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Apart:
    """No fusion: heads read the towers themselves."""

    reads_empty: ClassVar[bool] = True

    def streams(self, towers: tuple[str, ...]) -> tuple[str, ...]:
        """The towers."""
        return towers

    def build(self) -> nn.Module:
        """A module without parameters."""
        return _Same()


class _Same(nn.Module):
    def __call__(self, streams):
        return streams


AnyFusion = Annotated[
    Apart
    | GatedStreams
    | Mixing
    | FusionTransformer
    | Progressive
    | CoAttention
    | Graph
    | CrossAttention
    | SpatioTemporal
    | BetweenLayers
    | Fusion,
    Open("fusion", ("streams", "build")),
]
