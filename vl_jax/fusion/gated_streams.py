"""One tower looks at another through the cross-modal gate; what it then knows is a stream of its own."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from vl_jax.fusion.budget import LEARNING, BudgetConfig, GateOutput, Openings, budget_loss
from vl_jax.fusion.gate import CrossModalGate, CrossModalGateConfig, SkippingGate
from vl_jax.fusion.streams import Stream, Streams
from vl_jax.nn.layers import Linear


@dataclasses.dataclass(frozen=True)
class GatedStreams:
    """``fused = reader + gate(reader, source)``; it begins as the reader alone, since the gate is closed."""

    reader: str = "text"  # the tower that looks
    source: str = "image"  # the tower that is looked at
    gate: CrossModalGateConfig = CrossModalGateConfig()
    name: str = "fused"  # of the stream that comes of it

    reads_empty: ClassVar[bool] = True

    @property
    def budget(self) -> BudgetConfig | None:
        """Of the gate, if it has one."""
        return self.gate.budget

    def streams(self, towers: tuple[str, ...]) -> tuple[str, ...]:
        """The towers, and the fused stream.

        Raises:
          ValueError: the reader or the source is no tower.
        """
        for field in ("reader", "source"):
            if getattr(self, field) not in towers:
                known = ", ".join(towers)
                raise ValueError(f"fusion.{field}={getattr(self, field)!r} is no tower; there are: {known}")
        return *towers, self.name

    def build(self) -> nn.Module:
        """The module."""
        return GateBetween(self)


class GateBetween(nn.Module):
    """Adds the fused stream; the source is brought to the reader's width first."""

    config: GatedStreams

    def setup(self):
        budget = self.config.budget
        if budget is not None and budget.grain != "token":
            self.opening = Openings(1, name="looks")

    def looks(self, streams: Streams) -> Float[Array, " B"]:
        """How far every row is to look, as logits, from what it reads; where rows decide."""
        reader = streams[self.config.reader]
        return self.opening(reader.tokens, reader.mask)[:, 0]

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        c = self.config
        reader, source = streams[c.reader], streams[c.source]
        width = reader.tokens.shape[-1]
        seen = source.tokens
        if seen.shape[-1] != width:
            seen = Linear(width, ("embed", None), name="width")(seen)
        mask = reader.mask[:, :, None] & source.mask[:, None, :]
        if c.budget is None or not mask.size:
            tokens = reader.tokens
            if mask.size:
                tokens = tokens + CrossModalGate(c.gate, name="gate")(tokens, seen, mask)
            return {**streams, c.name: Stream(tokens, reader.mask)}
        logits = None
        if c.budget.grain != "token":
            logits = self.looks(streams)
        found, decided = SkippingGate(c.gate, name="gate")(
            reader.tokens, seen, mask, logits, learning=self.has_rng(LEARNING)
        )
        decided = jax.tree.map(lambda a: a[None], decided)  # one layer
        gates = GateOutput(decided, budget_loss(decided, c.budget))
        return {**streams, c.name: Stream(reader.tokens + found, reader.mask, gates=gates)}
