"""AdamW or Muon with the schedule, clipping, per-group rates and decay mask of the DeepSeek-VL recipes.

Muon (Jordan et al. 2024) replaces the momentum of a weight matrix by the nearest orthogonal matrix, scaled
as AdamW's updates are (Liu et al. 2025, arXiv 2502.16982, equation 4): both take the same learning rates.
What is not a hidden matrix (embedding, head, router, positions, norms, biases) stays with AdamW.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Literal

import jax
import optax
from optax import contrib

from vl_jax import params as params_lib

# The input and output axes of every kind of hidden weight matrix, counted from the end: layers and experts
# may be stacked in front. Leaves that no pattern matches are no matrices, to Muon or to adapters.
_MATRICES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    r".*stem/kernel(_\d+)?": ((-4, -3, -2), (-1,)),
    r"(?!.*head/).*/kernel": ((-2,), (-1,)),
    r".*/qkv": ((-4,), (-3, -2, -1)),
    r".*/project": ((-3, -2), (-1,)),
    r".*/(query|key|value)": ((-3,), (-2, -1)),
    r".*/kv_up": ((-1,), (-3, -2)),
    r".*/(attention|gate)/output": ((-3, -2), (-1,)),
    r".*/w_in": ((-3,), (-1,)),
    r".*/w_out": ((-2,), (-1,)),
}


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
    no_decay: tuple[str, ...] = (
        r".*/(scale|(\w+_)?bias\w*|opening|newline|separator|positions|class_token|probe|embedding)",
    )
    clip_norm: float = 1.0
    rates: tuple[tuple[str, float], ...] = ()  # (pattern of paths, multiple of the learning rate)

    def __post_init__(self):
        if self.learning_rate <= 0 or self.clip_norm <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} and clip_norm={self.clip_norm} must be > 0")
        if self.warmup_steps < 0 or not 0 <= self.final_fraction <= 1:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be >= 0, final_fraction={self.final_fraction} in 0..1"
            )


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
    config: OptimizerConfig, paths: set[str], all_paths: set[str]
) -> optax.GradientTransformation:
    """The optimiser over the trainable leaves of a stage, for a learning rate of 1.

    The step multiplies by the rate, an argument of it: stages that differ in their schedule only share one
    compiled program.

    Args:
      paths: the trainable leaves.
      all_paths: every leaf of the model, and adapters; patterns must match among these.

    Raises:
      ValueError: a pattern matches no parameter.
    """
    # No tree: with adapters, what is below the path of a parameter are the paths of its factors.
    everything = dict.fromkeys(sorted(all_paths))
    kept = params_lib.select(everything, config.no_decay)
    multiples = dict.fromkeys(paths, 1.0)
    for pattern, multiple in config.rates:
        multiples |= dict.fromkeys(params_lib.select(everything, (pattern,)) & paths, multiple)
    decay_mask = params_lib.unflatten({p: p not in kept for p in paths})
    scales = params_lib.unflatten(multiples)

    def scale_groups(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        return jax.tree.map(lambda u, m: u * m, updates, scales)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        _direction(config),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.stateless(scale_groups),
        optax.scale(-1.0),
    )


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradients to updates, before decay and learning rate."""
    adam = optax.scale_by_adam(*config.betas, eps=config.epsilon)
    if config.method == "adamw":
        return adam

    def dimensions(tree: optax.Params) -> optax.Params:
        return jax.tree_util.tree_map_with_path(_matrix_of, tree)

    def rescale(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        return jax.tree.map(_as_large_as_adam, updates, dimensions(updates))

    def method_of(tree: optax.Params) -> optax.Params:
        return jax.tree_util.tree_map_with_path(lambda p, x: "muon" if _matrix_of(p, x) else "adam", tree)

    muon = optax.chain(
        contrib.scale_by_muon(weight_dimension_numbers=dimensions),
        optax.stateless(rescale),
    )
    return optax.partition({"muon": muon, "adam": adam}, method_of)


def matrix_axes(path: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Input and output axes of a hidden weight matrix, its other axes being stacks; None for other leaves."""
    for pattern, axes in _MATRICES.items():
        if re.fullmatch(pattern, path):
            inputs, outputs = (tuple(a % ndim for a in side) for side in axes)
            return inputs, outputs
    return None


def _matrix_of(path: tuple[Any, ...], leaf: jax.Array) -> contrib.MuonDimensionNumbers | None:
    """Which axes of a parameter form the matrix Muon works on; None leaves it to AdamW."""
    axes = matrix_axes("/".join(str(key.key) for key in path), leaf.ndim)
    return None if axes is None else contrib.MuonDimensionNumbers(*axes)


def _as_large_as_adam(update: jax.Array, axes: Any) -> jax.Array:
    """An orthogonal matrix to a root mean square of 0.2, which AdamW's updates have."""
    sides = (math.prod(update.shape[a] for a in side) for side in (axes.reduction_axis, axes.output_axis))
    return update * (0.2 * math.sqrt(max(sides)))
