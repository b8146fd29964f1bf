"""Floating-point operations of a model, counted in a traced function: nothing is computed.

    forward_flops(layout, stage, example)    the objective on one batch of a stage

What a product needs follows from its shapes; everything else counts nothing.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from vl_jax.layout import Layout
from vl_jax.moe import stacks
from vl_jax.moe.config import ExecutionConfig
from vl_jax.train.stages import Stage
from vl_jax.train.step import TrainState

STEP_PASSES = 3  # a step costs so many forward passes: gradients take two more, of frozen weights too
_EXPERTS = "blocked_mlp"  # the function that multiplies by routed experts: its loops end where rows do


def forward_flops(layout: Layout, stage: Stage, example: Any) -> float:
    """Operations of the objective on one batch of a stage, forwards.

    Args:
      layout: of a model from a ``countable`` config.
      example: a batch of any number of rows.
    """
    rows = stage.batch_size
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), example)
    routing = stacks.init_state(layout.model.config.stacks)

    def losses(params: Any, batch: Any, collections: Any) -> Any:
        state = TrainState(np.zeros((), np.int32), params, None, routing, collections=collections)
        return stage.objective(params, state, batch, model=layout.model, rngs=None).losses

    def shapes(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)

    # Without a mesh: on one, each device would be counted by its own part of the rows.
    traced = jax.make_jaxpr(losses)(shapes(layout.params), batch, shapes(layout.collections))
    return count(traced.jaxpr)


def count(jaxpr: Any) -> float:
    """Operations of the products in a traced function, two for each multiplication that is added up.

    What nothing depends on is left out. Of branches the costliest counts, and a loop of unknown length
    counts once; routed experts are counted by the rows that they are given.
    """
    live, total = {v for v in jaxpr.outvars if not _is_constant(v)}, 0.0
    for equation in reversed(jaxpr.eqns):
        if not any(v in live for v in equation.outvars):
            continue
        live |= {v for v in equation.invars if not _is_constant(v)}
        total += _operations(equation)
    return total


def _is_constant(variable: Any) -> bool:
    return hasattr(variable, "val")


def _operations(equation: Any) -> float:
    kind, given = equation.primitive.name, equation.params
    shapes = [v.aval.shape for v in equation.invars]
    if kind == "dot_general":
        (contracted, _), _ = given["dimension_numbers"]
        summed = math.prod(shapes[0][axis] for axis in contracted)
        return 2.0 * summed * math.prod(equation.outvars[0].aval.shape)
    if kind == "conv_general_dilated":
        out, kernel = equation.outvars[0].aval.shape, shapes[1]
        outputs = kernel[given["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(out) * math.prod(kernel) / outputs
    inner = [_inner(value) for value in given.values()]
    found = [jaxpr for group in inner for jaxpr in group]
    if any(getattr(jaxpr.debug_info, "func_name", "") == _EXPERTS for jaxpr in found):
        weights = [shape for shape in shapes if len(shape) > 2]
        rows = equation.outvars[0].aval.shape[0]
        return 2.0 * rows * sum(math.prod(shape[1:]) for shape in weights)
    counts = [count(jaxpr) for jaxpr in found]
    if kind == "cond":
        return max(counts)
    return sum(counts) * (given["length"] if kind == "scan" else 1)


def _inner(value: Any) -> list[Any]:
    """The functions among the parameters of an operation."""
    values = value if isinstance(value, (tuple, list)) else [value]
    found = [getattr(v, "jaxpr", v) for v in values]
    return [v for v in found if hasattr(v, "eqns")]


def countable(config: Any) -> Any:
    """A config whose routed experts are computed by plain JAX, which can be traced on every platform."""
    if isinstance(config, ExecutionConfig):
        return dataclasses.replace(config, kernel="blocked", exchange="all_gather")
    if isinstance(config, tuple):
        return tuple(countable(part) for part in config)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    parts = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    changed = {name: countable(part) for name, part in parts.items()}
    changed = {
        name: part for name, part in changed.items() if part is not parts[name] and part != parts[name]
    }
    return dataclasses.replace(config, **changed) if changed else config
