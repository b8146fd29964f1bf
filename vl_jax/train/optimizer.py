"""AdamW or Muon with the schedule, clipping, per-group rates and decay mask of the DeepSeek-VL recipes.

Muon (Jordan et al. 2024) replaces the momentum of a weight matrix by the nearest orthogonal matrix, scaled
as AdamW's updates are (Liu et al. 2025, arXiv 2502.16982, equation 4): both take the same learning rates.
What is not a hidden matrix (embedding, head, router, positions, norms, biases) stays with AdamW. Which leaves
are matrices, and which decay, is their role: ``roles``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import optax
from optax import contrib

from vl_jax import params as params_lib
from vl_jax.roles import Role
from vl_jax.train.updates.plain_adam import clipped_plain_adam
from vl_jax.train.updates.unfreezing import Unfreeze, first_steps, in_turn

# The default of ``no_decay`` before modules said the role of their parameters; old runs have recorded it.
_NAMES_BEFORE_ROLES = (
    r".*/(scale|(\w+_)?bias\w*|opening|newline|separator|positions|class_token|probe|embedding)",
)


NO_LAYERS: Mapping[str, int] = {}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Defaults follow DeepSeek-VL2, section 3 (AdamW 0.9 / 0.95, decay 0.1, clip 1.0)."""

    method: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 4.5e-4  # peak
    schedule: Literal["constant", "cosine", "step"] = "cosine"  # step: / sqrt(10) at 50 % and at 75 %
    warmup_steps: int = 0
    final_fraction: float = 0.1  # of the peak, at the end of ``cosine``
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = ()  # patterns of paths, beside what does not decay by its role
    clip_norm: float = 1.0
    rates: tuple[tuple[str, float], ...] = ()  # (pattern of paths, multiple of the learning rate)
    unfreeze: tuple[Unfreeze, ...] = ()  # what begins to train later than the stage
    average: float = 0.0  # decay of a moving average of what trains, kept beside it; 0: none

    def __post_init__(self):
        if self.no_decay == _NAMES_BEFORE_ROLES:
            object.__setattr__(self, "no_decay", ())
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} and clip_norm={self.clip_norm} must be > 0")
        if not 0 <= self.average < 1:
            raise ValueError(f"average={self.average} must be in 0..1, less than 1; 0 keeps no average")
        if self.warmup_steps < 0 or not 0 <= self.final_fraction <= 1:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be >= 0, final_fraction={self.final_fraction} in 0..1"
            )


def without_schedule(config: OptimizerConfig) -> OptimizerConfig:
    """The config with everything at its default that only ``schedule`` reads."""
    names = ("learning_rate", "schedule", "warmup_steps", "final_fraction")
    return dataclasses.replace(config, **{name: getattr(OptimizerConfig, name) for name in names})


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the step within the stage: linear warm-up, then the named shape."""
    peak, rest = config.learning_rate, max(1, steps - config.warmup_steps)
    if config.schedule == "cosine":
        shape = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "step":
        drop = 1 / math.sqrt(10)
        shape = optax.piecewise_constant_schedule(peak, {rest // 2: drop, rest * 3 // 4: drop})
    else:
        shape = optax.constant_schedule(peak)
    if not config.warmup_steps:
        return shape
    warmup = optax.linear_schedule(peak / config.warmup_steps, peak, config.warmup_steps)
    return optax.join_schedules([warmup, shape], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig,
    paths: set[str],
    roles: Mapping[str, Role],
    *,
    layers: Mapping[str, int] = NO_LAYERS,
    plain: bool = False,
) -> optax.GradientTransformation:
    """The optimiser over the trainable leaves of a stage, for a learning rate of 1.

    The step multiplies by the rate, an argument of it: stages that differ in their schedule only share one
    compiled program.

    Args:
      paths: the trainable leaves.
      roles: of every leaf of the model, and of adapters, by path; patterns must match among these.
      layers: how many there are, by the path of a leaf whose first axis counts them.
      plain: ``update`` takes the plain gradient too, as ``plain``; see ``plain_adam``.

    Raises:
      ValueError: a pattern matches no parameter, or there is no such layer.
    """
    # No tree: with adapters, what is below the path of a parameter are the paths of its factors.
    everything = dict.fromkeys(sorted(roles))
    kept = params_lib.select(everything, config.no_decay)
    multiples = dict.fromkeys(paths, 1.0)
    for pattern, multiple in config.rates:
        multiples |= dict.fromkeys(params_lib.select(everything, (pattern,)) & paths, multiple)
    decay_mask = params_lib.unflatten({p: roles[p].decay and p not in kept for p in paths})
    scales = params_lib.unflatten(multiples)

    def scale_groups(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        return jax.tree.map(lambda u, m: u * m, updates, scales)

    first = (optax.clip_by_global_norm(config.clip_norm), _direction(config, roles))
    if plain:
        first = (clipped_plain_adam(config.clip_norm, config.betas, config.epsilon),)
    whole = optax.chain(
        *first,
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.stateless(scale_groups),
        optax.scale(-1.0),
    )
    if not config.unfreeze:
        return whole
    begins = first_steps(config.unfreeze, everything, layers)
    return in_turn(whole, {path: step for path, step in begins.items() if path in paths})


def _direction(config: OptimizerConfig, roles: Mapping[str, Role]) -> optax.GradientTransformation:
    """Gradients to updates, before decay and learning rate."""
    adam = optax.scale_by_adam(*config.betas, eps=config.epsilon)
    if config.method == "adamw":
        return adam

    def matrix_of(path: tuple[Any, ...], leaf: jax.Array) -> contrib.MuonDimensionNumbers | None:
        """Which axes of a parameter form the matrix Muon works on; None leaves it to AdamW."""
        role = roles["/".join(str(key.key) for key in path)]
        if not role.is_matrix:
            return None
        inputs, outputs = (tuple(a % leaf.ndim for a in side) for side in (role.inputs, role.outputs))
        return contrib.MuonDimensionNumbers(inputs, outputs)

    def dimensions(tree: optax.Params) -> optax.Params:
        return jax.tree_util.tree_map_with_path(matrix_of, tree)

    def rescale(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        return jax.tree.map(_as_large_as_adam, updates, dimensions(updates))

    def method_of(tree: optax.Params) -> optax.Params:
        return jax.tree_util.tree_map_with_path(lambda p, x: "muon" if matrix_of(p, x) else "adam", tree)

    muon = optax.chain(
        contrib.scale_by_muon(weight_dimension_numbers=dimensions),
        optax.stateless(rescale),
    )
    return optax.partition({"muon": muon, "adam": adam}, method_of)


def _as_large_as_adam(update: jax.Array, axes: Any) -> jax.Array:
    """An orthogonal matrix to a root mean square of 0.2, which AdamW's updates have."""
    sides = (math.prod(update.shape[a] for a in side) for side in (axes.reduction_axis, axes.output_axis))
    return update * (0.2 * math.sqrt(max(sides)))
