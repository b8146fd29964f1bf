"""What a scheme decides on given logits, without a layer around it: what ``properties`` look at.

    logits [G T N] --route--> weights [G T E] of every token's experts, losses, gradients of both

No expert is computed, so one small program answers all questions, on many inputs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vl_jax.moe import routing
from vl_jax.moe.assignment import (
    Assignment,
    ExpertChoice,
    RoutingContext,
    Soft,
    TokenChoice,
    weights_of,
)
from vl_jax.moe.routing import MoEConfig

GROUPS, LENGTH, WIDTH = 4, 8, 8
PADDING = "padding chooses nothing"


class Waived(Exception):
    """Why a property is not asked of this scheme, or cannot be checked here."""


class Broken(AssertionError):
    """What a scheme breaks: a property by its own name, where a check looks at several."""

    def __init__(self, broken: str, detail: str):
        """Takes the name of the property, for which ``advice`` has an entry, and what was found."""
        super().__init__(detail)
        self.broken = broken


def hold(broken: str, holds: Any, detail: str) -> None:
    """Raises ``Broken`` unless it holds."""
    if not holds:
        raise Broken(broken, detail)


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a scheme decided, on the host."""

    assignment: Assignment
    weights: np.ndarray  # f32[G T E] of the experts in every token
    losses: dict[str, np.ndarray]
    scores: np.ndarray  # f32[G T E] probabilities for statistics
    gradient: Any = None  # f32[G T N] of a sum of the weights, or of the losses

    @property
    def chosen(self) -> np.ndarray:
        """Which experts a token uses, bool[G T E]."""
        if not isinstance(self.assignment, TokenChoice):
            return self.weights > 0
        experts = np.arange(self.weights.shape[-1])
        return np.any(self.assignment.experts[..., None] == experts, axis=2)


@dataclasses.dataclass(frozen=True)
class Router:
    """A scheme without its layer."""

    config: MoEConfig
    state: Any
    params: Any  # of the scheme's own, by name

    def decide(
        self,
        logits: np.ndarray,
        context: RoutingContext,
        state: Any = None,
        *,
        probe: np.ndarray | None = None,
        of_losses: bool = False,
    ) -> Decision:
        """What is decided in evaluation.

        Args:
          state: of the scheme, if it is not the initial one.
          probe: what weights are multiplied by for the gradient of their sum; random by default.
          of_losses: the gradient is that of the losses.
        """
        probe = random_probe(self.config) if probe is None else probe
        cotangents = np.float32(not of_losses) * probe, np.float32(of_losses)
        state = self.state if state is None else state
        return Decision(
            *jax.device_get(_compiled(self.config)(logits, context, state, self.params, cotangents))
        )

    def traced_anew(self) -> Callable[[np.ndarray, RoutingContext], Decision]:
        """As ``decide``, without gradients; in training, if the context has keys."""
        traced = jax.jit(functools.partial(_decide, config=self.config))
        return lambda logits, context: Decision(
            *jax.device_get(traced(logits, context, self.state, self.params))
        )

    def trace(self, logits: np.ndarray, context: RoutingContext) -> None:
        """Runs the scheme on shapes alone."""
        jax.eval_shape(
            functools.partial(_decide, config=self.config), logits, context, self.state, self.params
        )

    def inputs(self, seed: int, *, length: int = LENGTH) -> tuple[np.ndarray, RoutingContext]:
        """Random logits, and rows of different lengths for them."""
        x, context = make_inputs(seed, self.config)
        columns = routing.scheme_of(self.config).columns(self.config)
        logits = np.random.default_rng(seed).standard_normal((GROUPS, LENGTH, columns), np.float32)
        context = dataclasses.replace(context, x=x)
        pad = length - LENGTH
        return jax.tree.map(
            lambda a: np.pad(a, ((0, 0), (0, pad)) + ((0, 0),) * (a.ndim - 2)), (logits, context)
        )


def in_layer(context: RoutingContext, params: Any) -> RoutingContext:
    """The context as the first layer hands it on, with the parameters of the scheme's own."""
    return dataclasses.replace(context, params=params, layer=jnp.int32(0))


def make_inputs(seed: int, config: MoEConfig) -> tuple[np.ndarray, RoutingContext]:
    """(x, context): random rows of different lengths, of text and pictures."""
    scheme, previous = routing.scheme_of(config), None
    if scheme.previous:
        shape = (GROUPS, LENGTH, scheme.columns(config))
        previous = np.random.default_rng((seed, 1)).standard_normal(shape, np.float32)
    random = np.random.default_rng(seed)
    index = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (GROUPS, LENGTH))
    lengths = np.array([LENGTH, LENGTH, LENGTH - 2, LENGTH - 3])
    context = RoutingContext(
        valid=index < lengths[:, None],
        modality=(index % 3 == 0).astype(np.int32),
        tokens=random.integers(0, 1000, index.shape).astype(np.int32),
        positions=index,
        previous=previous,
    )
    return random.standard_normal((GROUPS, LENGTH, WIDTH), np.float32), context


@functools.cache
def _compiled(config: MoEConfig) -> Callable[..., tuple]:
    return jax.jit(functools.partial(_decide, config=config))


def _decide(
    logits: jax.Array,
    context: RoutingContext,
    state: Any,
    params: Any,
    cotangents: Any = None,
    *,
    config: MoEConfig,
) -> tuple:
    context = in_layer(context, params)

    def parts(logits: jax.Array) -> tuple:
        assignment, losses = routing.route(logits, context, state, config)
        weights = weights_of(assignment, context.valid, config.num_experts)
        total = sum(losses.values(), start=jnp.zeros((), jnp.float32))
        return (weights, total), (assignment, weights, losses)

    scores = routing.probabilities(logits, context, config)
    if cotangents is None:
        return *parts(logits)[1], scores
    _, pull, found = jax.vjp(parts, logits, has_aux=True)
    return *found, scores, pull(cotangents)[0]


def random_probe(config: MoEConfig) -> np.ndarray:
    """A factor for every weight, f32[G T E]."""
    return np.random.default_rng(0).standard_normal((GROUPS, LENGTH, config.num_experts), np.float32)


def sound(
    assignment: Assignment, losses: dict[str, Any], valid: np.ndarray, config: MoEConfig, *, what: str = ""
) -> None:
    """Ids are in range and differ, weights are finite and not negative, and padding has none.

    Raises:
      Broken: what is not so; one line.
    """
    scheme = f"scheme={config.scheme!r}{what}"
    for name, leaf in {**vars(assignment), **losses}.items():
        hold("weights and losses are finite", np.isfinite(leaf).all(), f"{scheme}: {name} is not finite")
    if isinstance(assignment, TokenChoice):
        experts, gates, unused = assignment.experts, assignment.gates, config.num_experts
        _in_range(experts, unused, f"{scheme}: expert ids", f" ({unused}: unused)")
        hold(PADDING, (experts[~valid] == unused).all(), f"{scheme}: padding chooses an expert")
        hold(
            "unused choices weigh nothing",
            not gates[experts == unused].any(),
            f"{scheme}: an unused choice has a gate",
        )
        times = np.sum(experts[..., None] == np.arange(unused), axis=2).max()
        hold("ids distinct per token", times <= 1, f"{scheme}: a token names the same expert {times} times")
    elif isinstance(assignment, ExpertChoice):
        _in_range(assignment.tokens, valid.shape[1] - 1, f"{scheme}: token indices", "")
        masked = ~np.take_along_axis(valid[:, None], assignment.tokens, axis=2)
        hold(PADDING, not assignment.gates[masked].any(), f"{scheme}: an expert takes padding")
    elif isinstance(assignment, Soft):
        kept = assignment.dispatch[~valid], assignment.combine[~valid]
        hold(PADDING, not any(k.any() for k in kept), f"{scheme}: padding has weights")
    for name, leaf in vars(assignment).items():
        hold(
            "weights are not negative",
            np.issubdtype(leaf.dtype, np.integer) or (leaf >= 0).all(),
            f"{scheme}: {name} go down to {leaf.min():.2g}; an expert weighs 0 or more",
        )


def _in_range(ids: np.ndarray, last: int, what: str, note: str) -> None:
    lowest, highest = ids.min(), ids.max()
    hold(
        "ids in range",
        lowest >= 0 and highest <= last,
        f"{what} from {lowest} to {highest}, must be 0 to {last}{note}",
    )
