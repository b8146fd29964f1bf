"""Gated interaction between trunks: after every layer, each looks at what the others know by then.

    trunk a: block 0 --.-- a + sum of looks --> block 1 --.-- ...
                       X
    trunk b: block 0 --'-- b + sum of looks --> block 1 --'-- ...

    look of a at b = gate of b [B] * tanh(opening [head]) * cross-attention(norm(a), norm(b))
    gate of b      = sigmoid(words . selector of b + bias of b)      words: the mean of the text's tokens

Openings start at zero, so at step 0 the trunks are those of separate towers exactly (as Flamingo's, arXiv
2204.14198). The gate of a modality follows the words of its row: what is asked says which modality counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vl_jax.encoders.transformer import Through
from vl_jax.fusion.weights import ModalityWeights
from vl_jax.nn import attention
from vl_jax.nn.layers import RMSNorm, fan_in, join_heads, named, split_heads

Trunks = Mapping[str, tuple[Float[Array, "B _ _"], Bool[Array, "B _"]]]  # tokens, and which are there


@dataclasses.dataclass(frozen=True)
class BetweenLayers:
    """All towers look at one another after every layer; heads then read the towers themselves."""

    words: str = "text"  # the tower whose tokens say how much each modality counts
    num_heads: int = 4
    head_dim: int = 32

    reads_empty: ClassVar[bool] = True
    weighs: ClassVar[bool] = True  # its streams say how much each modality counts
    placement: ClassVar[str] = "between_layers"

    def __post_init__(self):
        if self.num_heads < 1 or self.head_dim < 1:
            raise ValueError(f"num_heads={self.num_heads}, head_dim={self.head_dim}: must be >= 1")

    def streams(self, towers: tuple[str, ...]) -> tuple[str, ...]:
        """The towers.

        Raises:
          ValueError: the words are of no tower.
        """
        if self.words not in towers:
            raise ValueError(f"fusion.words={self.words!r} is no tower; there are: {', '.join(towers)}")
        return towers

    def check_encoders(self, encoders: Mapping[str, Any]) -> None:
        """Makes sure that the towers can go layer by layer together.

        Raises:
          ValueError: one cannot be driven, has experts, or has another number of layers.
        """
        layers = {name: getattr(encoder, "num_layers", 0) for name, encoder in encoders.items()}
        for name, encoder in encoders.items():
            if not getattr(encoder, "goes_through", False) or encoder.stack is not None:
                raise ValueError(
                    f"fusion=BetweenLayers: tower {name!r} is a {type(encoder).__name__}; expected a "
                    "ViTConfig or TextEncoderConfig without experts, whose layers can run one by one"
                )
        if len(set(layers.values())) > 1:
            said = ", ".join(f"{name} {count}" for name, count in layers.items())
            raise ValueError(f"fusion=BetweenLayers: towers have {said} layers; expected as many each")

    def build(self) -> nn.Module:
        """The module: ``(number of the layer, trunks) -> trunks, gates``."""
        return Interactions(self)


def in_step(
    towers: Mapping[str, Callable[[Through], Any]],
    layers: int,
    interact: Callable[[int, dict[str, jax.Array]], dict[str, jax.Array]],
) -> dict[str, Any]:
    """What some towers give, where they go layer by layer together.

    Each is called within the one before: all have begun when the first layer runs, and none has ended.

    Args:
      towers: each takes what its blocks go through, and gives what it makes of them.
      interact: what comes of all trunks after the layer of a number.
    """
    begun: dict[str, tuple[jax.Array, Callable[[int, jax.Array], jax.Array]]] = {}
    ended: dict[str, jax.Array] = {}
    found: dict[str, Any] = {}

    def begin(rest: list[str]) -> None:
        if not rest:
            tokens = {name: x for name, (x, _) in begun.items()}
            for number in range(layers):
                tokens = interact(number, {name: begun[name][1](number, x) for name, x in tokens.items()})
            ended.update(tokens)
            return
        name, *others = rest

        def through(x: jax.Array, block: Callable[[int, jax.Array], jax.Array]) -> jax.Array:
            begun[name] = x, block
            begin(others)
            return ended[name]

        found[name] = towers[name](through)

    begin(list(towers))
    return {name: found[name] for name in towers}


class Interactions(nn.Module):
    """The interactions after all layers; called once for each."""

    config: BetweenLayers

    @nn.compact
    def __call__(self, number: int, trunks: Trunks) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The tokens after a layer, and how far each modality is let through: f32[B] by tower."""
        return Interaction(self.config, name=f"layer_{number}")(trunks)

    def touch(self, encoders: Mapping[str, Any]) -> None:
        """Touches every parameter once."""
        trunks = {
            name: (jnp.zeros((1, 1, e.embed_dim)), jnp.ones((1, 1), bool)) for name, e in encoders.items()
        }
        for number in range(next(iter(encoders.values())).num_layers):
            self(number, trunks)


class Interaction(nn.Module):
    """The looks of all trunks at all others."""

    config: BetweenLayers

    @nn.compact
    def __call__(self, trunks: Trunks) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        gates = self._gates(trunks)
        after, opened = {}, {name: [] for name in trunks}
        for name, (x, _) in trunks.items():
            total = x
            for other, (source, mask) in trunks.items():
                if other == name:
                    continue
                opening = self.param(
                    f"{name}_at_{other}_opening", named(nn.initializers.zeros, None), (self.config.num_heads,)
                )
                opened[other].append(jnp.mean(jnp.abs(jnp.tanh(opening))))
                seen = LookAt(self.config, name=f"{name}_at_{other}")(x, source, mask, jnp.tanh(opening))
                total = total + seen * gates[other][:, None, None].astype(x.dtype)
            after[name] = total
        shares = {name: sum(of) / max(len(of), 1) for name, of in opened.items()}
        return after, {name: gate * shares[name] for name, gate in gates.items()}

    def _gates(self, trunks: Trunks) -> dict[str, Float[Array, " B"]]:
        """How much each modality counts in each row, from 0 to 1."""
        mean = None
        if self.config.words in trunks:
            x, mask = trunks[self.config.words]
            weights = mask[..., None].astype(jnp.float32)
            mean = jnp.sum(x.astype(jnp.float32) * weights, axis=1)
            mean = RMSNorm(name="words_norm")(mean / jnp.maximum(jnp.sum(weights, axis=1), 1.0))
        gates = {}
        for name, (x, _) in trunks.items():
            bias = self.param(f"{name}_bias", named(nn.initializers.zeros), ())
            logits = jnp.full(x.shape[:1], bias)
            if mean is not None:
                init = named(fan_in(), "embed", None, decay=True)
                selector = self.param(f"{name}_selector", init, (mean.shape[-1], 1))
                logits = logits + (mean @ selector)[:, 0]
            gates[name] = jax.nn.sigmoid(logits)
        return gates


class LookAt(nn.Module):
    """Cross-attention of one trunk to another, of whatever width; a row that sees nothing gets 0."""

    config: BetweenLayers

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        source: Float[Array, "B S C"],
        mask: Bool[Array, "B S"],
        opening: Float[Array, " N"],
    ) -> Float[Array, "B T D"]:
        c = self.config
        heads = c.num_heads, c.head_dim
        init = named(fan_in(), "embed", "heads", None, inputs=(0,))
        seen = RMSNorm(name="norm_source")(source)
        query = self.param("query", init, (x.shape[-1], *heads)).astype(x.dtype)
        key, value = (
            self.param(n, init, (source.shape[-1], *heads)).astype(x.dtype) for n in ("key", "value")
        )
        mixed = attention.attend(
            split_heads(RMSNorm(name="norm")(x), query),
            split_heads(seen, key),
            split_heads(seen, value),
            mask=mask[:, None, :],
            scale=c.head_dim**-0.5,
        )
        init = named(fan_in(in_axis=(0, 1)), "heads", None, "embed", inputs=(0, 1))
        out = self.param("output", init, (*heads, x.shape[-1])).astype(x.dtype)
        return join_heads(mixed * opening[:, None].astype(x.dtype), out)


def mean_weights(gates: list[dict[str, jax.Array]], present: Mapping[str, jax.Array]) -> ModalityWeights:
    """How far each modality was let through, over all layers.

    Args:
      present: bool[B] by tower, whether the row has it.
    """
    names = tuple(present)
    values = [sum(layer[name] for layer in gates) / len(gates) for name in names]
    there = jnp.stack([present[name] for name in names], axis=1)
    return ModalityWeights(jnp.where(there, jnp.stack(values, axis=1), 0), there, names)
