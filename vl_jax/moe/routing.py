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
from collections.abc import Mapping
from dataclasses import field
from fractions import Fraction
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl_jax import parts
from vl_jax.kernels.activation import SWIGLU, Activation
from vl_jax.moe import assignment as assignment_lib
from vl_jax.moe import scheme as scheme_lib
from vl_jax.moe import slots
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
    balanced_routes,
    by_group,
)
from vl_jax.moe.choosing import MASKED, best, gates_of, of_columns
from vl_jax.moe.config import (
    BalanceConfig,
    CapacityConfig,
    Chosen,
    ExecutionConfig,
    ExpertGroupsConfig,
    GateConfig,
    SharedExpertsConfig,
    SimpleExpertsConfig,
    check_widths,
)
from vl_jax.moe.scheme import Option, Param, Scheme
from vl_jax.moe.specialise import drawn as drawing
from vl_jax.moe.varied import per_layer

__all__ = [
    "EXCLUDED",
    "GROUPS",
    "MASKED",
    "ROUTES",
    "SCHEMES",
    "TAUGHT",
    "TOWARDS",
    "Assignment",
    "ExpertChoice",
    "Losses",
    "Malformed",
    "Merge",
    "MoEConfig",
    "Param",
    "RoutingContext",
    "RoutingStats",
    "Scheme",
    "Soft",
    "State",
    "TokenChoice",
    "balanced_routes",
    "best",
    "gates_of",
    "init_state",
    "is_causal",
    "probabilities",
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
# Those with a router of their own; the default of ``language.depths``.
BLOCK_SCHEMES = {"predicted_choice": "vl_jax.moe.schemes.predicted:PREDICTED_CHOICE"}


# An entry of the state that an intervention adds: bool, [1 1 E], [G 1 E] or [G T E], experts that may not be
# chosen.
# Their logits are ``MASKED`` and ``best`` passes them over; what a scheme still chooses of them is taken out
# of its assignment.
EXCLUDED = "excluded"
# Another one: i32[G T K], routes that tokens are to take, such as those of an earlier pass (*replay*; of a
# rollout, when it is trained on: R3, arXiv 2510.11370). Gates and losses are of the scores of this pass.
ROUTES = "routes"
# A third one: f32, of the first one's shapes, weights of a loss that draws a token to experts.
TOWARDS = "towards"
# A fourth one: f32[G T N+1], logits of another router, which a loss draws to, and last how much they count.
TAUGHT = "taught"


class Malformed(ValueError):
    """What a scheme returned is no assignment, or has the wrong shapes."""


@dataclasses.dataclass(frozen=True)
class MoEConfig(Chosen):
    """One sparse layer: router, routed experts, shared experts, and how tokens move.

    Attributes:
      scheme: one of ``SCHEMES``, or ``path/to/file.py:name``.
      num_experts: E, the routed experts.
      top_k: K, how many of them a token takes; the mean that is aimed for, where that varies.
      expert_dim: the hidden width of one routed expert.
      shared: experts that every token takes, beside the routed ones.
      simple: how many of the routed experts, the last ones, multiply by no matrix: zero, copy, constant.
      gates: how much a chosen expert's output weighs.
      groups: experts in groups, of which a token may use a few.
      router_bias: whether the linear router has a learned bias.
      expert_bias: whether both projections of every routed expert have biases.
      activation: of the experts.
      balance: losses and biases that keep load even, and logits small.
      limit: the most tokens that an expert takes.
      execution: exchange and kernel, which the machine decides; the model stays the same.
      options: pairs of name and value, the scheme's own; ``option`` reads one. On the command line one is
        set by its name, ``--config.model.moe.options.k_max=3``.
      layers: what differs in some layers, as pairs such as ``("0-3.top_k", 1)``; see ``varied.per_layer``.
      widths: hidden widths of equal parts of the experts, in place of ``expert_dim``; see ``varied``.
    """

    MOVED: ClassVar[Mapping[str, str]] = {
        "num_shared": "shared.num",
        "shared_dim": "shared.dim",
        "shared_gate": "shared.gate",
        "score": "gates.score",
        "normalize_gates": "gates.normalize",
        "gate_scale": "gates.scale",
        "num_groups": "groups.num",
        "top_groups": "groups.top",
        "excluded": "groups.excluded",
        "balance_weight": "balance.weight",
        "balance_scope": "balance.scope",
        "z_weight": "balance.z_weight",
        "bias_rate": "balance.bias_rate",
        "balanced": "balance.forced",
        "capacity_factor": "limit.factor",
        "capacity": "limit.slots",
        "priority": "limit.priority",
        "exchange": "execution.exchange",
        "kernel": "execution.kernel",
    }

    shared: SharedExpertsConfig = field(default_factory=SharedExpertsConfig)
    simple: SimpleExpertsConfig = field(default_factory=SimpleExpertsConfig, kw_only=True)
    gates: GateConfig = field(default_factory=GateConfig)
    groups: ExpertGroupsConfig = field(default_factory=ExpertGroupsConfig)
    router_bias: bool = False
    expert_bias: bool = False
    activation: Activation = SWIGLU
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    limit: CapacityConfig = field(default_factory=CapacityConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    options: tuple[tuple[str, Option], ...] = ()
    layers: tuple[tuple[str, Option | None], ...] = ()
    widths: tuple[int, ...] = ()

    def __post_init__(self):
        named, groups = f"(scheme={self.scheme!r})", self.groups
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k} must be from 1 to num_experts={self.num_experts} {named}")
        if self.expert_dim < 1:
            raise ValueError(f"expert_dim={self.expert_dim} must be >= 1")
        if self.simple.num >= self.num_experts:
            raise ValueError(
                f"simple has {self.simple.num} of num_experts={self.num_experts} experts; it must leave one"
            )
        if self.num_experts % groups.num:
            raise ValueError(
                f"groups.num={groups.num} must divide num_experts={self.num_experts} into equal groups"
            )
        if self.top_k > groups.top * self.group_size:
            raise ValueError(
                f"top_k={self.top_k} must be at most the {groups.top * self.group_size} experts of "
                f"groups.top={groups.top}"
            )
        if self.execution.exchange == "all_to_all" and self.is_dropless:
            raise ValueError(
                "execution.exchange='all_to_all' needs limit.factor or limit.slots: it sends slots, and a "
                "dropless layer has no number of them"
            )
        scheme, given = scheme_of(self), [name for name, _ in self.options]
        for name, value in self.options:
            if name not in scheme.defaults:
                known = scheme.defaults or ("none",)
                raise ValueError(f"scheme={self.scheme!r} has no option {name!r}; {parts.near(name, known)}")
            if given.count(name) > 1:
                raise ValueError(f"options name {name!r} more than once")
            scheme_lib.as_option(value, scheme.defaults[name], f"scheme={self.scheme!r}: options.{name}")
        if self.balance.forced and not scheme.replays:
            raise ValueError(f"balance.forced=True: scheme={self.scheme!r} takes no routes that are given")
        scheme.validate(self)
        per_layer.check(self)
        check_widths(self.widths, self.num_experts - self.simple.num, by_width=self.balance.by_width)

    def capacity_of(self, length: int) -> int | None:
        """The most slots an expert has for a group of so many tokens; None without a limit."""
        if self.slots_per_token is None:
            return self.limit.slots
        return slots.ceil_times(length, self.slots_per_token, most=length)

    @property
    def slots_per_token(self) -> Fraction | None:
        """Slots that an expert has for each token of a group; None where no factor sets them."""
        if self.limit.factor is None:
            return None
        return slots.as_fraction(self.limit.factor) * self.top_k / self.num_experts

    def option(self, name: str) -> Any:
        """The value of one of the scheme's own options, or its default, whose type it has.

        Raises:
          KeyError: the scheme has no such option.
        """
        defaults = scheme_of(self).defaults
        if name not in defaults:
            raise KeyError(f"scheme={self.scheme!r} has no option {name!r}; {parts.near(name, defaults)}")
        return scheme_lib.as_option(dict(self.options).get(name, defaults[name]), defaults[name], name)

    @property
    def group_size(self) -> int:
        return self.num_experts // self.groups.num

    @property
    def shared_width(self) -> int:
        """Hidden width of the fused shared experts; 0 without any."""
        if not self.shared.num:
            return 0
        return self.shared.num * self.expert_dim if self.shared.dim is None else self.shared.dim

    @property
    def is_dropless(self) -> bool:
        return self.limit.factor is None and self.limit.slots is None


def scheme_of(config: MoEConfig) -> Scheme:
    """The scheme a config names.

    Raises:
      ValueError: no built-in scheme, file or name of that kind, or it is no scheme; one line.
    """
    return _load(config.scheme)


@functools.cache
def _load(spec: str) -> Scheme:
    known, expected = SCHEMES | BLOCK_SCHEMES, "a Scheme or a route function"
    if spec in known:
        module, _, name = known[spec].partition(":")
        return getattr(importlib.import_module(module), name)
    found = parts.find(spec, known, kind="scheme", expected=expected)
    if isinstance(found, Scheme):
        return found
    if not callable(found) or isinstance(found, type):
        raise ValueError(f"scheme={spec!r}: expected {expected}, found {type(found).__name__}")
    return Scheme(found)  # pyright: ignore[reportArgumentType]


def is_causal(config: MoEConfig) -> bool:
    """Whether a token's experts depend on no later token; without that, decoding differs from training."""
    looks_ahead = not config.is_dropless and config.limit.priority != "position"
    return scheme_of(config).causal and not looks_ahead


def init_state(config: MoEConfig) -> State:
    """The initial state of one layer: the scheme's, and shares of load where the balance loss needs them."""
    state = scheme_of(config).init_state(config)
    if config.balance.scope == "step":
        state = {**state, "share": jnp.full((config.num_experts,), 1 / config.num_experts, jnp.float32)}
    return state


def update_state(state: State, stats: RoutingStats, config: MoEConfig) -> State:
    """The state of one layer after an optimiser step, from statistics of everything the step saw."""
    state = scheme_of(config).update_state(state, stats, config)
    if config.balance.scope == "step":
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
      Malformed: what the scheme returns is no assignment, or has the wrong shapes.
      ValueError: there are routes in the state, and the scheme takes none, or they are of other tokens;
        experts are excluded of another number or for other tokens, or of single tokens where the scheme gives
        all of them the same.
    """
    scheme, length = scheme_of(config), logits.shape[1]
    routes, state = state.get(ROUTES), {name: value for name, value in state.items() if name != ROUTES}
    if config.balance.forced:
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
            raise Malformed(f"scheme={config.scheme!r}: {error}") from None
        return result

    logits, given, drawn = logits.astype(jnp.float32), state.get(EXCLUDED), {}
    shape = (*context.valid.shape, config.num_experts)
    if TOWARDS in state:  # of the logits as they are, whatever experts are excluded
        towards = drawing.of_tokens(state[TOWARDS], shape, "experts to be drawn to")
        scores = probabilities(logits, context, config)
        drawn = {TOWARDS: drawing.drawn_loss(scores, towards, context.valid)}
    if TAUGHT in state:
        drawn[TAUGHT] = drawing.taught_loss(logits, state[TAUGHT], context.valid)
    state = {name: value for name, value in state.items() if name not in (EXCLUDED, TOWARDS, TAUGHT)}
    if given is None:
        assignment, losses = by_group(one_group, logits, context)
        return assignment, {name: jnp.mean(value) for name, value in losses.items()} | drawn
    try:
        excluded = drawing.of_tokens(given, shape, "excluded experts")
    except ValueError as error:
        raise ValueError(f"scheme={config.scheme!r}: {error}") from None
    context = context.replace(excluded=excluded)  # pyright: ignore[reportAttributeAccessIssue]
    if scheme.by_expert:
        logits = jnp.where(of_columns(excluded, logits), MASKED, logits)
    assignment, losses = by_group(one_group, logits, context)
    try:
        assignment = assignment_lib.without(assignment, excluded, shared=given.shape[1] == 1)
    except ValueError as error:
        raise ValueError(f"scheme={config.scheme!r}: {error}") from None
    return assignment, {name: jnp.mean(value) for name, value in losses.items()} | drawn


def probabilities(
    logits: Float[Array, "G T N"], context: RoutingContext, config: MoEConfig
) -> Float[Array, "G T E"]:
    """Probabilities of the experts by the scheme's own scores, for statistics."""
    scheme = scheme_of(config)
    if scheme.scores_of_group is None:
        return scheme.scores(logits, config)
    of_group = scheme.scores_of_group
    return by_group(lambda z, where: of_group(z, where, config), logits, context)


def choose(
    experts: Int[Array, "T K"], gates: Float[Array, "T K"], context: RoutingContext, config: MoEConfig
) -> TokenChoice:
    """Normalises and scales gates as configured; padding, and ids >= E, choose nothing."""
    if config.gates.normalize:
        gates = gates / (jnp.sum(gates, axis=-1, keepdims=True) + 1e-20)
    used = context.valid[:, None] & (experts < config.num_experts)
    return TokenChoice(
        jnp.where(used, experts, config.num_experts), jnp.where(used, gates * config.gates.scale, 0.0)
    )
