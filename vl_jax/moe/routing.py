"""Routing schemes: pure functions from router logits to an *assignment* of tokens to experts.

    route(logits [T N], context, state, config) -> (assignment, losses)
    init_state(config) -> state                    run once; default: empty
    update_state(state, stats, config) -> state    run once per optimiser step; default: unchanged

A scheme sees one group of T tokens (a row of the batch) and writes nothing else: dispatch, capacity, expert
parallelism, kernels, statistics and the mean of its losses over the batch are derived by the library. Scores,
selection and losses are float32. The layer *returns* its statistics, so rematerialisation, scanning,
accumulation and sharding cannot count a token twice.

``MoEConfig.scheme`` names a built-in scheme, or ``path/to/file.py:name`` a scheme in a file of one's own.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vl_jax import parts
from vl_jax.kernels.activation import SWIGLU, Activation
from vl_jax.moe import assignment as assignment_lib
from vl_jax.moe.assignment import (
    GROUPS,
    Assignment,
    ExpertChoice,
    Losses,
    Merge,
    RoutingContext,
    RoutingStats,
    Soft,
    State,
    TokenChoice,
)

__all__ = [
    "EXCLUDED",
    "GROUPS",
    "MASKED",
    "ROUTES",
    "SCHEMES",
    "Assignment",
    "ExpertChoice",
    "Losses",
    "Merge",
    "MoEConfig",
    "RoutingContext",
    "RoutingStats",
    "Scheme",
    "Soft",
    "State",
    "TokenChoice",
    "balanced_routes",
    "best",
    "gates_of",
    "group_keys",
    "init_state",
    "is_causal",
    "route",
    "scheme_of",
    "update_state",
]

# Where each built-in scheme is; it is imported when it is first used.
_PLACES = {
    "token_choice": (
        "top_k",
        "top_k_softmax",
        "switch",
        "gshard",
        "noisy_top_k",
        "v_moe",
        "sinkhorn",
        "loss_free",
        "modality_bias",
    ),
    "dynamic": ("top_p", "remoe", "expert_threshold", "null_experts", "dselect_k"),
    "fixed": ("hash", "modality_top_k"),
    "expert_choice": ("expert_choice", "modality_expert_choice"),
    "soft": ("soft_moe", "smear"),
}
SCHEMES = {
    name: f"vl_jax.moe.schemes.{file}:{name.upper()}" for file, names in _PLACES.items() for name in names
}


# An entry of the state that an intervention adds: bool, [1 1 E] or [G T E], experts that may not be chosen.
# Their logits are ``MASKED``; a scheme that adds something to its scores leaves those at the lowest number.
EXCLUDED, MASKED = "excluded", -1e9
# Another one: i32[G T K], routes that tokens are to take, such as those of an earlier pass (*replay*; of a
# rollout, when it is trained on: R3, arXiv 2510.11370). Gates and losses are of the scores of this pass.
ROUTES = "routes"


Kernel = Literal["auto", "blocked", "pallas", "triton", "reference"]


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """One sparse layer: router, routed experts, shared experts, and how tokens move."""

    scheme: str = "top_k"  # one of SCHEMES, or "path/to/file.py:name"
    num_experts: int = 64
    top_k: int = 6
    expert_dim: int = 1408  # hidden width of one routed expert
    num_shared: int = 2  # shared experts, fused into one block
    shared_dim: int | None = None  # width of that block; None: num_shared * expert_dim
    shared_gate: bool = False  # multiply its output by a learned sigmoid of the token (Qwen2-MoE)
    score: Literal["softmax", "sigmoid"] | None = None  # None: the scheme's own, softmax for most
    num_groups: int = 1  # experts are cut into groups of equal size ...
    top_groups: int = 1  # ... of which a token may use this many
    excluded: Literal["lowest", "zero"] = "lowest"  # selection score of experts in the other groups
    normalize_gates: bool = False  # divide the chosen gates by their sum; of one, that leaves 1
    gate_scale: float = 1.0
    router_bias: bool = False  # a learned bias of the logits
    expert_bias: bool = False  # biases of both projections of every routed expert
    activation: Activation = SWIGLU
    balance_weight: float = 1e-3  # balance loss (0: none)
    # Tokens over which load is to be even: a row, the (micro-)batch, or the whole of the previous step.
    balance_scope: Literal["sequence", "batch", "step"] = "sequence"
    z_weight: float = 0.0  # router z-loss (ST-MoE, arXiv 2202.08906)
    bias_rate: float = 1e-3  # step of the loss-free bias (arXiv 2408.15664)
    # Routes are dealt out in turn and not chosen, so that load is even: the speed that balance can reach.
    balanced: bool = False
    capacity_factor: float | None = None  # None: dropless; else slots per expert over the mean load
    capacity: int | None = None  # slots per expert and row, as a number
    priority: Literal["position", "gate"] = "position"  # who keeps a slot when capacity runs out
    # How tokens reach experts on other devices; ``all_to_all`` needs a capacity. See ``exchange``.
    exchange: Literal["all_gather", "ring", "all_to_all", "ragged"] = "all_gather"
    kernel: Kernel = "auto"  # see ``kernels.target.choose``
    options: tuple[tuple[str, float], ...] = ()  # numbers of the scheme's own; see its ``defaults``

    def __post_init__(self):
        named = f"(scheme={self.scheme!r})"
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k} must be from 1 to num_experts={self.num_experts} {named}")
        if self.expert_dim < 1 or self.num_shared < 0:
            raise ValueError(f"expert_dim={self.expert_dim} must be >= 1, num_shared={self.num_shared} >= 0")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(
                f"num_groups={self.num_groups} must divide num_experts={self.num_experts} into equal groups"
            )
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"top_groups={self.top_groups} must be from 1 to num_groups={self.num_groups}")
        if self.top_k > self.top_groups * self.group_size:
            raise ValueError(
                f"top_k={self.top_k} must be at most the {self.top_groups * self.group_size} experts of "
                f"top_groups={self.top_groups}"
            )
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(f"capacity_factor={self.capacity_factor} must be > 0 (None: dropless) {named}")
        if self.capacity is not None and (self.capacity < 1 or self.capacity_factor is not None):
            raise ValueError(f"capacity={self.capacity} must be >= 1, and excludes capacity_factor {named}")
        if self.exchange == "all_to_all" and self.is_dropless:
            raise ValueError(
                "exchange='all_to_all' needs capacity or capacity_factor: it sends slots, and a dropless "
                "layer has no number of them"
            )
        scheme, given = scheme_of(self), [name for name, _ in self.options]
        for name in given:
            if name not in scheme.defaults:
                known = scheme.defaults or ("none",)
                raise ValueError(f"scheme={self.scheme!r} has no option {name!r}; {parts.near(name, known)}")
            if given.count(name) > 1:
                raise ValueError(f"options name {name!r} more than once")
        if self.balanced and not scheme.replays:
            raise ValueError(f"balanced=True: scheme={self.scheme!r} takes no routes that are given")
        scheme.validate(self)

    def slots(self, length: int) -> int | None:
        """The most slots an expert has for a group of so many tokens; None without a capacity."""
        if self.capacity is not None or self.capacity_factor is None:
            return self.capacity
        return math.ceil(self.capacity_factor * self.top_k * length / self.num_experts)

    def option(self, name: str) -> float:
        """The value of one of the scheme's own numbers, or its default."""
        return dict(self.options).get(name, scheme_of(self).defaults[name])

    @property
    def group_size(self) -> int:
        return self.num_experts // self.num_groups

    @property
    def shared_width(self) -> int:
        """Hidden width of the fused shared experts; 0 without any."""
        if not self.num_shared:
            return 0
        return self.num_shared * self.expert_dim if self.shared_dim is None else self.shared_dim

    @property
    def is_dropless(self) -> bool:
        return self.capacity_factor is None and self.capacity is None


def softmax_scores(logits: Float[Array, "*G N"], config: MoEConfig) -> Float[Array, "*G E"]:
    """Probabilities of the experts: the softmax over the first E columns."""
    return jax.nn.softmax(logits[..., : config.num_experts], axis=-1)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A routing scheme: a function, and what the library has to know about it."""

    route: Callable[[Any, RoutingContext, State, MoEConfig], tuple[Assignment, Losses]]
    init_state: Callable[[MoEConfig], State] = lambda config: {}
    update_state: Callable[[State, RoutingStats, MoEConfig], State] = lambda state, stats, config: state
    causal: bool = True  # a token's experts depend on no later token
    equivariant: bool = True  # permuting the tokens of a group permutes their experts
    defaults: Mapping[str, float] = dataclasses.field(default_factory=dict)  # options and their values
    columns: Callable[[MoEConfig], int] = lambda config: config.num_experts  # width N of the logits
    # Probabilities of the experts, for statistics.
    scores: Callable[[Any, MoEConfig], Any] = softmax_scores
    # What ``update_state`` needs besides load: scalars and vectors by name, added up over groups.
    measure: Callable[[Any, RoutingContext, MoEConfig], dict[str, Any]] | None = None
    validate: Callable[[MoEConfig], None] = lambda config: None  # raises ValueError
    rng: bool = False  # whether it routes differently in training, where it is given ``context.rng``
    replays: bool = False  # whether it takes given routes: it chooses by ``best`` and weighs by ``gates_of``


def scheme_of(config: MoEConfig) -> Scheme:
    """The scheme a config names.

    Raises:
      ValueError: no built-in scheme, file or name of that kind, or it is no scheme; one line.
    """
    return _load(config.scheme)


@functools.cache
def _load(spec: str) -> Scheme:
    if spec in SCHEMES:
        module, _, name = SCHEMES[spec].partition(":")
        return getattr(importlib.import_module(module), name)
    expected = "a Scheme or a route function"
    found = parts.find(spec, SCHEMES, kind="scheme", expected=expected)
    if isinstance(found, Scheme):
        return found
    if not callable(found) or isinstance(found, type):
        raise ValueError(f"scheme={spec!r}: expected {expected}, found {type(found).__name__}")
    return Scheme(found)  # pyright: ignore[reportArgumentType]


def is_causal(config: MoEConfig) -> bool:
    """Whether a token's experts depend on no later token; without that, decoding differs from training."""
    by_gate = not config.is_dropless and config.priority == "gate"
    return scheme_of(config).causal and not by_gate


def init_state(config: MoEConfig) -> State:
    """The initial state of one layer: the scheme's, and shares of load where the balance loss needs them."""
    state = scheme_of(config).init_state(config)
    if config.balance_scope == "step":
        state = {**state, "share": jnp.full((config.num_experts,), 1 / config.num_experts, jnp.float32)}
    return state


def update_state(state: State, stats: RoutingStats, config: MoEConfig) -> State:
    """The state of one layer after an optimiser step, from statistics of everything the step saw."""
    state = scheme_of(config).update_state(state, stats, config)
    if config.balance_scope == "step":
        load = jnp.sum(stats.load, axis=0).astype(jnp.float32)
        total = jnp.sum(load)
        share = jnp.where(total > 0, load / jnp.maximum(total, 1.0), state["share"])
        state = {**state, "share": share}
    return state


def route(
    logits: Float[Array, "G T N"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[Assignment, Losses]:
    """Routes every group on its own; losses are the means over groups.

    Raises:
      ValueError: what the scheme returns is no assignment, or has the wrong shapes; there are routes in the
        state, and the scheme takes none, or they are of other tokens.
    """
    scheme, length = scheme_of(config), logits.shape[1]
    routes, state = state.get(ROUTES), {name: value for name, value in state.items() if name != ROUTES}
    if config.balanced:
        routes = balanced_routes(context.valid, num_experts=config.num_experts, top_k=config.top_k)
    if routes is not None:
        if not scheme.replays or routes.ndim != 3 or routes.shape[:2] != context.valid.shape:
            raise ValueError(
                f"scheme={config.scheme!r}: routes {routes.shape} are given for {context.valid.shape} tokens"
                + ("" if scheme.replays else ", and it takes none (see Scheme.replays)")
            )
        context = context.replace(routes=routes)  # pyright: ignore[reportAttributeAccessIssue]

    def one_group(logits: jax.Array, context: RoutingContext) -> tuple[Assignment, Losses]:
        result = scheme.route(logits, context, state, config)
        try:
            assignment_lib.check(result, length=length, num_experts=config.num_experts)
        except ValueError as error:
            raise ValueError(f"scheme={config.scheme!r}: {error}") from None
        return result

    logits, excluded = logits.astype(jnp.float32), state.get(EXCLUDED)
    if excluded is not None:
        state = {name: value for name, value in state.items() if name != EXCLUDED}
        others = jnp.zeros((*excluded.shape[:-1], logits.shape[-1] - config.num_experts), bool)
        logits = jnp.where(jnp.concatenate([excluded, others], axis=-1), MASKED, logits)
    assignment, losses = jax.vmap(one_group, axis_name=GROUPS)(logits, context)
    return assignment, {name: jnp.mean(value) for name, value in losses.items()}


def group_keys(key: jax.Array, context: RoutingContext) -> jax.Array:
    """A key for every group, from what is in it and not from where it is in the batch.

    So noise is the same on any number of devices and with or without accumulation.
    """
    groups, length = context.valid.shape
    if context.tokens is None:
        return jax.random.split(key, groups)
    # Odd multipliers, so that no token is lost modulo 2**32.
    odd = jax.random.bits(jax.random.key(0), (length,), jnp.uint32) | jnp.uint32(1)
    tokens = jnp.where(context.valid, context.tokens + 1, 0).astype(jnp.uint32)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
        key, jnp.sum(tokens * odd, axis=1, dtype=jnp.uint32)
    )


def balanced_routes(valid: Bool[Array, "G T"], *, num_experts: int, top_k: int) -> Int[Array, "G T K"]:
    """Experts dealt out to the valid tokens of all groups in turn: no two loads differ by more than one."""
    tokens = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    earlier = jnp.cumsum(tokens[:, -1]) - tokens[:, -1]
    first = top_k * (earlier[:, None] + tokens - 1)
    experts = (first[..., None] + jnp.arange(top_k, dtype=jnp.int32)) % num_experts
    return jnp.where(valid[..., None], experts, num_experts)


def best(choice: Float[Array, "T N"], count: int, context: RoutingContext) -> Int[Array, "T K"]:
    """The ``count`` experts of highest selection score; or the given routes, if there are any."""
    if context.routes is not None:
        return context.routes
    return jax.lax.top_k(choice, count)[1]


def gates_of(
    scores: Float[Array, "T N"], experts: Int[Array, "T K"], *, unused: float = 0.0
) -> Float[Array, "T K"]:
    """The score of every chosen expert, and ``unused`` for ids past the last."""
    return jnp.take_along_axis(scores, experts, axis=-1, mode="fill", fill_value=unused)


def choose(
    experts: Int[Array, "T K"], gates: Float[Array, "T K"], context: RoutingContext, config: MoEConfig
) -> TokenChoice:
    """Normalises and scales gates as configured; padding, and ids >= E, choose nothing."""
    if config.normalize_gates:
        gates = gates / (jnp.sum(gates, axis=-1, keepdims=True) + 1e-20)
    used = context.valid[:, None] & (experts < config.num_experts)
    return TokenChoice(
        jnp.where(used, experts, config.num_experts), jnp.where(used, gates * config.gate_scale, 0.0)
    )
