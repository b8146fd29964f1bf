"""The budget of a gate: how much of its work it may do, who decides that, and the loss that keeps it there.

    training    soft: every look is computed, and multiplied by its probability of being open
                hard: multiplied by 0 or 1, with the gradient of the probability (straight-through)
    inference   0 or 1, and what is closed is not computed (see ``skipping``)

The budget is of what a closed gate really saves: decisions that inference would make, not probabilities.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from vl_jax.nn.layers import Linear, RMSNorm
from vl_jax.params import Leaf

LEARNING = "gate"  # the random stream that training gives a model with a budget, and inference does not

Grain = Literal["sample", "layer", "token"]


@dataclasses.dataclass(frozen=True)
class BudgetConfig:
    """What is decided, how much may be open, and how it is trained.

    A sample's look at pictures is decided once for all layers (``sample``) or for every layer by itself
    (``layer``), from what stands before its first answer. With ``token`` every token decides in every layer,
    from what it knows itself, so that decoding decides as training does.
    """

    grain: Grain = "layer"
    share: float = 0.5  # of the looks that are to be open, over samples, layers and tokens together
    weight: float = 1.0  # of the loss that draws the open share to ``share``
    hard: bool = False  # in training: multiply by 0 or 1, straight-through; by the probability otherwise
    buckets: int = 4  # sizes to which open rows are filled up at inference; 0: compute all, multiply by 0
    tower: bool | None = None  # leave the tower out too for a sample that is closed; None: where that can be

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} of a gate's budget: must be from 0 to 1")
        if self.weight < 0 or self.buckets < 0:
            raise ValueError(f"weight={self.weight}, buckets={self.buckets} of a gate's budget: must be >= 0")
        if self.tower and self.grain == "token":
            raise ValueError(
                "tower=True with grain='token' of a gate's budget: tokens decide in the layers, after the "
                "tower has run; set grain='sample' or 'layer', where words decide, or tower=None"
            )
        if self.tower and not self.buckets:
            raise ValueError(
                "tower=True with buckets=0 of a gate's budget: 0 leaves nothing out; set buckets=4"
            )

    def leaves_out_tower(self, *, against: str) -> bool:
        """Whether the tower is left out for samples that do not look in any layer.

        Args:
          against: why it cannot be in this model; empty where it can.

        Raises:
          ValueError: it cannot be, and ``tower`` says that it has to be.
        """
        if self.tower and against:
            raise ValueError(f"tower=True of a gate's budget: {against}; set tower=None")
        return self.tower is not False and self.grain != "token" and self.buckets > 0 and not against

    def refuse_shared_rows(self, *, packing: bool, branches: bool, where: str) -> None:
        """Refuses rows of several questions where a row has one decision.

        Raises:
          ValueError: names what does not fit.
        """
        if self.grain == "token" or not (packing or branches):
            return
        what = "data.packing" if packing else "data.conversation.turns='independent' with max_turns above 1"
        raise ValueError(
            f"{where}.grain={self.grain!r} with {what}: the questions of a row would share one decision; set "
            "data.packing=None and data.conversation.max_turns=1, or grain='token'"
        )


@struct.dataclass
class Decided:
    """What one gate decided for some rows, as sums; layers are a leading axis where there are several."""

    rows: Leaf  # f32[] samples, or tokens, that could look at something
    open: Leaf  # f32[] of those, the open ones; its gradient is that of their probabilities
    doubt: Leaf  # f32[] p (1 - p) summed over them
    missed: Leaf  # f32[] cross-entropy of the open ones by their logits, where a rank decided
    executed: Leaf  # f32[] rows that were computed, those that fill up a size included
    by_row: Leaf  # f32[B] the mean probability, or share of open tokens at inference; -1: nothing to look at


@struct.dataclass
class Opening:
    """How far each row, or token, is open."""

    value: Leaf  # f32[B] or [B T] what its look is multiplied by
    is_open: Leaf  # bool, the same shape
    decided: Decided


def decide(
    logits: Float[Array, "B *T"], able: Bool[Array, "B *T"], config: BudgetConfig, *, learning: bool
) -> Opening:
    """Who is open: at inference and under ``hard``, those whose logit is not negative.

    Tokens that learn under ``hard`` are open by rank: of each row as many as the budget says, those with the
    highest logits. That is no causal rule, so their logits learn to foretell it (Mixture-of-Depths, arXiv
    2404.02258, section 3.5), and inference asks for the sign alone.

    Args:
      able: those that have something to look at; the others are closed, and not counted.
    """
    logits = logits.astype(jnp.float32)
    probability = jax.nn.sigmoid(logits)
    is_open = (logits >= 0) & able
    by_rank = learning and config.hard and config.grain == "token"
    if by_rank:
        is_open = _highest(logits, able, config.share)
    exact = is_open.astype(jnp.float32)
    straight = exact + (probability - jax.lax.stop_gradient(probability)) * able.astype(jnp.float32)
    value = exact
    if learning:
        value = straight if config.hard else probability * able.astype(jnp.float32)
    able_rows = able.astype(jnp.float32)
    missed = _cross_entropy(logits, exact) if by_rank else jnp.zeros_like(logits)
    axes = tuple(range(1, able.ndim))
    count = jnp.sum(able_rows, axis=axes)
    shown = jnp.sum((value if learning and not config.hard else exact) * able_rows, axis=axes)
    decided = Decided(
        rows=jnp.sum(able_rows),
        open=jnp.sum(straight * able_rows),
        doubt=jnp.sum(probability * (1 - probability) * able_rows),
        missed=jnp.sum(missed * able_rows),
        executed=jnp.float32(able.size),
        by_row=jax.lax.stop_gradient(jnp.where(count > 0, shown / jnp.maximum(count, 1), -1)),
    )
    return Opening(value, is_open, decided)


def _highest(logits: jax.Array, able: jax.Array, share: float) -> jax.Array:
    """Of each row the tokens with the highest logits, as many as the share says; earlier ones win ties."""
    order = jnp.argsort(jnp.where(able, -logits, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    most = jnp.ceil(share * jnp.sum(able, axis=-1, keepdims=True).astype(jnp.float32))
    return able & (rank.astype(jnp.float32) < most)


def _cross_entropy(logits: jax.Array, truth: jax.Array) -> jax.Array:
    return jax.nn.softplus(logits) - logits * jax.lax.stop_gradient(truth)


def budget_loss(decided: Decided, config: BudgetConfig) -> Float[Array, ""]:
    """The squared distance of the open share from its budget, and the mean doubt; already weighted.

    Without the doubt a soft gate could sit half open everywhere: within its budget, and saving nothing.
    Where a rank decides, it keeps the budget, and the loss is that of foretelling it.
    """
    rows = jnp.maximum(jnp.sum(decided.rows), 1.0)
    if config.hard and config.grain == "token":
        return config.weight * jnp.sum(decided.missed) / rows
    away = jnp.sum(decided.open) / rows - config.share
    # A batch without pictures has no share; it must not draw one anywhere.
    some = (jnp.sum(decided.rows) > 0).astype(jnp.float32)
    return config.weight * some * (away**2 + jnp.sum(decided.doubt) / rows)


@struct.dataclass
class GateOutput:
    """What the gates of a model decided."""

    decided: Decided  # of every layer: [L], and [L B] by row
    loss: Leaf  # f32[] of the budget, already weighted
    tower: Leaf = 0.0  # f32[] samples for which the tower ran, those that fill up a size included

    def sums(self) -> dict[str, Any]:
        """What a step adds up over its micro-batches; see ``summarize``."""
        d = jax.lax.stop_gradient(self.decided)
        return {
            "rows": d.rows,
            "open": d.open,
            "executed": d.executed,
            "tower": jnp.asarray(self.tower, jnp.float32),
            "loss": jax.lax.stop_gradient(self.loss),
            "parts": jnp.ones(()),
        }


def summarize(sums: dict[str, Any]) -> dict[str, jax.Array]:
    """The figures of the log: the loss of the budget, and the open share in all and by layer."""
    if not sums:
        return {}
    rows = jnp.maximum(sums["rows"], 1.0)
    figures = {
        "gate/budget_loss": sums["loss"] / sums["parts"],
        "gate/open": jnp.sum(sums["open"]) / jnp.maximum(jnp.sum(sums["rows"]), 1.0),
        "gate/rows": jnp.sum(sums["rows"]),
        "gate/rows_executed": jnp.sum(sums["executed"]),
        "gate/tower_rows_executed": sums["tower"],
    }
    if rows.shape[0] > 1:
        shares = sums["open"] / rows
        figures |= {f"gate/open/layer_{layer}": shares[layer] for layer in range(rows.shape[0])}
    return figures


class Openings(nn.Module):
    """How far each row is to look in every layer, from the mean of its words."""

    layers: int  # 1: one decision
    hidden: int = 64

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], words: Bool[Array, "B T"]) -> Float[Array, "B L"]:
        weights = words[..., None].astype(jnp.float32)
        mean = jnp.sum(x.astype(jnp.float32) * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1.0)
        hidden = nn.silu(Linear(self.hidden, ("embed", None), True, name="inner")(RMSNorm(name="norm")(mean)))
        return Linear(self.layers, (None, None), True, hidden=False, name="outer")(hidden)
