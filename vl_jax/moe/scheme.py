"""What a routing scheme is to the library: its functions, its parameters, and what it declares of itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from vl_jax.moe.assignment import Assignment, Losses, RoutingContext, RoutingStats, State
from vl_jax.nn.layers import Init, fan_in

MoEConfig = Any  # the one of ``routing``, which knows schemes and is not known here
Option = bool | int | float | str  # what an option of a scheme may be
_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def as_option(value: Option, default: Option, name: str) -> Option:
    """A value for an option, in the type of its default.

    Raises:
      ValueError: it is of another kind; one line.
    """
    kind, number = type(default), isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number:
        return float(value)
    if kind is int and number and value == int(value):
        return int(value)
    if type(value) is not kind:
        raise ValueError(f"{name}={value!r} must be {_KINDS[kind]} (default: {default!r})")
    return value


def softmax_scores(logits: Float[Array, "*G N"], config: MoEConfig) -> Float[Array, "*G E"]:
    """Probabilities of the experts: the softmax over the first E columns."""
    return jax.nn.softmax(logits[..., : config.num_experts], axis=-1)


@dataclasses.dataclass(frozen=True)
class Param:
    """A parameter of a scheme: it is trained, sharded, saved and exported like any other.

    Attributes:
      shape: sizes of its dimensions; () is a single number.
      names: the logical name of every dimension, by which the mesh cuts it: ``embed``, ``experts``, ``mlp``,
        ``heads``, ``vocab``, or None, which keeps it whole.
      init: the initialiser, ``jax.nn.initializers``' or one like them: ``init(key, shape, dtype)``. None: for
        a matrix random values by its fan-in, for a vector or a single number zeros.
      decay: whether weight decay draws it to zero.
    """

    shape: tuple[int, ...]
    names: tuple[str | None, ...]
    init: Init | None = None
    decay: bool = True

    def __post_init__(self):
        if len(self.shape) != len(self.names):
            raise ValueError(
                f"Param names={self.names} must name every dimension of shape={self.shape} (None: kept whole)"
            )

    @property
    def begin(self) -> Init:
        """The initialiser."""
        default = fan_in() if len(self.shape) > 1 else nn.initializers.zeros
        return default if self.init is None else self.init


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declared:
    """What a scheme declares of itself, by keyword; ``Scheme`` explains it."""

    causal: bool = True
    equivariant: bool = True
    rng: bool = False
    replays: bool = False
    by_expert: bool = True
    tokens: bool = False
    previous: bool = False
    foresees: bool = False


@dataclasses.dataclass(frozen=True)
class Scheme(Declared):
    """A routing scheme: a function, and what the library has to know about it.

    Every function sees one group of T tokens (a row of the batch) and one layer. N are the columns of the
    logits, E the experts, K is ``config.top_k``, D the width of the model.

    Attributes:
      route: ``route(logits [T N], context, state, config) -> (assignment, losses)``. Logits are float32. The
        assignment is a ``TokenChoice``, ``ExpertChoice``, ``Soft`` or ``Merge``; losses are scalars by name,
        already weighted, of which the library takes the mean over groups.
      init_state: ``init_state(config) -> state``, a dict of arrays, once per run and layer; default: empty.
      update_state: ``update_state(state, stats, config) -> state``, once per optimiser step, from the
        ``RoutingStats`` of everything the step saw; default: unchanged. ``route`` only reads the state.
      causal: a token's experts depend on no later token. Without that, decoding differs from training.
      foresees: in training alone they do depend on later ones, of the same sample: ``context.positions``
        begin at 0 with each. The scheme has ``rng=True`` and tells by ``context.rng``. ``causal`` is then
        about evaluation and generation.
      equivariant: permuting the tokens of a group permutes their experts.
      defaults: the scheme's options by name, with their values; ``config.option(name)`` reads one, and
        ``--config.model.moe.options.NAME=VALUE`` sets one. Each has the type that its default has.
      columns: ``columns(config) -> N``, the width of the logits; default: E.
      scores: ``scores(logits [... N], config) -> [... E]``, probabilities of the experts, for statistics and
        losses; default: the softmax over the first E columns.
      scores_of_group: the same as ``scores_of_group(logits [T N], context, config) -> [T E]``, where they
        depend on what a token is, or on parameters of the scheme, and not on logits alone.
      measure: ``measure(logits [T N], context, config) -> dict`` of what ``update_state`` needs besides
        load: sums over valid tokens, which are added up over groups and arrive as ``stats.measured``.
      validate: ``validate(config)`` raises ``ValueError`` for a config that the scheme cannot be used with.
      rng: it routes differently in training, where it is given ``context.rng``. In evaluation and generation
        there is none: ``context.rng`` is None then, and the scheme must do without noise.
      replays: it takes given routes: it chooses by ``best`` and weighs by ``gates_of``.
      by_expert: the first E columns of the logits are those of the experts. Those of excluded experts are
        then set to ``MASKED`` before ``route`` sees them.
      tokens: it needs ``context.tokens``, which encoders of pictures do not have.
      params: ``params(D, config) -> {name: Param}``, parameters of the scheme's own in every layer. They
        arrive as ``context.params``, float32, under the same names.
      logits: ``logits(x [T D], context, config) -> [T N]``, in place of the linear router, which then has no
        parameters: an MLP, or cosines. ``x`` is float32.
      previous: it reads ``context.previous``, the logits of the sparse layer before.
      most: ``most(T, config)``, the most tokens of a group of T that an expert takes in training; default: T.
        Where the one expert is a whole block (``language.depths``), there is room for no more.
    """

    route: Callable[[Any, RoutingContext, State, MoEConfig], tuple[Assignment, Losses]]
    init_state: Callable[[MoEConfig], State] = lambda config: {}
    update_state: Callable[[State, RoutingStats, MoEConfig], State] = lambda state, stats, config: state
    defaults: Mapping[str, Option] = field(default_factory=dict)
    columns: Callable[[MoEConfig], int] = lambda config: config.num_experts
    scores: Callable[[Any, MoEConfig], Any] = softmax_scores
    scores_of_group: Callable[[Any, RoutingContext, MoEConfig], Any] | None = None
    measure: Callable[[Any, RoutingContext, MoEConfig], dict[str, Any]] | None = None
    validate: Callable[[MoEConfig], None] = lambda config: None
    params: Callable[[int, MoEConfig], Mapping[str, Param]] = lambda width, config: {}
    logits: Callable[[Any, RoutingContext, MoEConfig], Any] | None = None
    most: Callable[[int, MoEConfig], int] = lambda length, config: length
