"""The cross-modal gate: between decoder layers, text tokens attend to vision tokens through a learned gate.

    x + tanh(opening[head]) * sigmoid(norm(x) @ selector)[token, head] * cross_attention(norm(x), vision)

``opening`` starts at zero, so at step 0 the model equals its text model exactly (Flamingo, arXiv 2204.14198);
``selector`` lets every token decide how much it looks. With a budget, whole looks are open or closed besides,
and a closed one is not computed at inference (``budget``, ``skipping``).
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vl_jax.fusion.budget import BudgetConfig, Decided, Opening, decide
from vl_jax.fusion.skipping import open_rows, open_tokens
from vl_jax.nn import attention
from vl_jax.nn.layers import Linear, RMSNorm, fan_in, named


@dataclasses.dataclass(frozen=True)
class CrossModalGateConfig:
    """Cross-attention heads of the gate."""

    num_heads: int = 8
    head_dim: int = 64
    opens: bool = True  # it begins closed and learns to open; else it is open from the start
    budget: BudgetConfig | None = None  # which looks are left out, and how many; None: none

    def __post_init__(self):
        if self.num_heads < 1 or self.head_dim < 1:
            raise ValueError(f"num_heads={self.num_heads}, head_dim={self.head_dim}: must be >= 1")


def gated_cross_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    *,
    opening: Float[Array, " N"] | None,
    choice: Float[Array, "B T N"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Attention to vision tokens, scaled by ``tanh(opening)`` per head and ``sigmoid(choice)`` per token.

    Args:
      opening: None scales by the choice alone.
    """
    seen = attention.attend(query, key, value, mask=mask, scale=query.shape[-1] ** -0.5)
    gate = jax.nn.sigmoid(choice.astype(jnp.float32))
    if opening is not None:
        gate = jnp.tanh(opening) * gate
    return seen * gate[..., None].astype(seen.dtype)


class CrossModalGate(nn.Module):
    """What flows from vision tokens into text tokens; returns the residual to add."""

    config: CrossModalGateConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], vision: Float[Array, "B S D"], mask: Bool[Array, "B T S"]
    ) -> Float[Array, "B T D"]:
        c, width = self.config, x.shape[-1]
        normed, seen = RMSNorm(name="norm")(x), RMSNorm(name="norm_vision")(vision)

        def project(name: str, source: jax.Array) -> jax.Array:
            init = named(fan_in(), "embed", "heads", None, inputs=(0,))
            kernel = self.param(name, init, (width, c.num_heads, c.head_dim))
            return jnp.einsum("BSD,DNH->BSNH", source, kernel.astype(source.dtype))

        query, key, value = project("query", normed), project("key", seen), project("value", seen)
        opening = None
        if c.opens:
            opening = self.param("opening", named(nn.initializers.zeros, None), (c.num_heads,))
        selector = self.param("selector", named(fan_in(), "embed", None, decay=True), (width, c.num_heads))
        mixed = gated_cross_attention(
            query, key, value, opening=opening, choice=normed @ selector.astype(x.dtype), mask=mask
        )
        init = named(fan_in(in_axis=(0, 1)), "heads", None, "embed", inputs=(0, 1))
        out = self.param("output", init, (c.num_heads, c.head_dim, width))
        return jnp.einsum("BTNH,NHD->BTD", mixed, out.astype(x.dtype))


class SkippingGate(nn.Module):
    """A cross-modal gate whose looks are open or closed; its parameters are those of the gate, and some more.

    Returns the residual to add, and what was decided.
    """

    config: CrossModalGateConfig  # with a budget

    def setup(self):
        self.look = CrossModalGate(self.config)
        nn.share_scope(self, self.look)
        assert self.config.budget is not None
        if self.config.budget.grain == "token":
            self.choice_norm = RMSNorm()
            self.choice = Linear(1, ("embed", None), True, hidden=False)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        vision: Float[Array, "B S D"],
        mask: Bool[Array, "B T S"],
        logits: Float[Array, " B"] | None = None,
        *,
        learning: bool = False,
    ) -> tuple[Float[Array, "B T D"], Decided]:
        """Looks.

        Args:
          logits: of the rows that are to look; None: every token decides.
          learning: as in training: everything is computed, and gradients reach the decisions.
        """
        config = self.config.budget
        assert config is not None
        able = jnp.any(mask, axis=-1)
        if config.grain == "token":
            logits = self.choice(self.choice_norm(x))[..., 0]
        else:
            assert logits is not None
            able = jnp.any(able, axis=-1)
        opening = decide(logits, able, config, learning=learning)
        if learning or not config.buckets or self.is_initializing():
            seen = self.look(x, vision, mask)
            value = opening.value if opening.value.ndim == 2 else opening.value[:, None]
            return seen * value[..., None].astype(seen.dtype), opening.decided
        return self._skipping(x, vision, mask, opening, config.buckets)

    def _skipping(
        self, x: jax.Array, vision: jax.Array, mask: jax.Array, opening: Opening, buckets: int
    ) -> tuple[jax.Array, Decided]:
        """The looks that are open alone. A branch cannot hold a bound module, so it applies a free one."""
        look, params = self.look.clone(parent=None, name=None), self.look.variables["params"]

        def compute(params: Any, parts: Any) -> jax.Array:
            (x, mask), vision = parts
            return cast(jax.Array, look.apply({"params": params}, x, vision, mask))

        if opening.is_open.ndim == 2:
            found, rows = open_tokens(compute, opening.is_open, params, (x, mask), vision, buckets=buckets)
        else:
            found, rows = open_rows(compute, opening.is_open, params, ((x, mask), vision), buckets=buckets)
        return found, dataclasses.replace(opening.decided, executed=rows)
