"""What an arm costs, counted before it runs: steps, samples, tokens, parameters, floating-point operations.

Nothing is computed and no parameter allocated: the objective is traced, and the products in it are counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.encoders.build import AnyEncoder
from vl_jax.experiment import Experiment, example_batch, plan
from vl_jax.layout import Layout
from vl_jax.moe import stacks
from vl_jax.moe.config import ExecutionConfig
from vl_jax.schema import ConfigError
from vl_jax.train.stages import Stage
from vl_jax.train.step import TrainState

_BACKWARD = 3  # a step costs so many forward passes: gradients take two more, of frozen weights too
_EXPERTS = "blocked_mlp"  # the function that multiplies by routed experts: its loops end where rows do


@dataclasses.dataclass(frozen=True)
class ArmCost:
    """Of a whole run, but for the parameters."""

    steps: int
    samples: int  # rows, which hold one sample each unless they are packed
    tokens: int  # places in rows, padding included
    parameters: int
    active_parameters: int  # of those, the ones that a token meets
    flops: float  # of training: three times the products of the forward pass


def cost_of(experiment: Experiment) -> ArmCost:
    """What the stages of a resolved experiment cost.

    Raises:
      ValueError: the experiment cannot be built; see ``experiment.plan``.
    """
    experiment = _with_countable_kernel(experiment)
    layout = plan(experiment)
    example = example_batch(experiment, sharding.batch_axes(layout.mesh))
    length, known, flops = example.tokens.shape[1], dict[Any, float](), 0.0
    for stage in experiment.stages:
        key = (stage.objective, stage.batch_size)
        if key not in known:
            known[key] = _forward(layout, stage, example)
        flops += _BACKWARD * stage.steps * known[key]
    samples = sum(stage.steps * stage.batch_size for stage in experiment.stages)
    sizes = {path: leaf.size for path, leaf in params_lib.flatten(layout.params).items()}
    return ArmCost(
        steps=sum(stage.steps for stage in experiment.stages),
        samples=samples,
        tokens=samples * length,
        parameters=sum(sizes.values()),
        active_parameters=round(
            sum(
                size * _active(path, layout.placements[path].names, layout.model.config.stacks)
                for path, size in sizes.items()
            )
        ),
        flops=flops,
    )


@dataclasses.dataclass(frozen=True)
class EncoderCost:
    """Of one input: a picture, or a text of full length."""

    multiply_adds: float  # of the products, forwards
    parameters: int
    active_parameters: int  # of those, the ones that a token meets


def encoder_cost(config: AnyEncoder) -> EncoderCost:
    """What an encoder costs for one input: all that it gives, its vector and its maps included.

    Nothing is computed. Routed experts count by the rows that they are given.
    """
    config = _with_countable_kernel(config)
    part: stacks.Stacks = {} if config.stack is None else {"": config.stack}
    state = stacks.init_state(part).get("")
    # Texts are given as ids, pictures as levels, other inputs as they say.
    usual = {1: "int32", 3: "uint8"}.get(len(config.input_shape), "float32")
    dtype = np.dtype(getattr(config, "input_dtype", usual))
    inputs = jax.ShapeDtypeStruct((1, *config.input_shape), dtype)
    module = config.build(np.float32)
    boxed = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, None, state), inputs)
    variables = nn.meta.unbox(boxed)
    traced = jax.make_jaxpr(lambda v, x: module.apply(v, x, None, state))(variables, inputs)
    sizes = {path: leaf.size for path, leaf in params_lib.flatten(variables["params"]).items()}
    boxes = params_lib.flatten(boxed["params"])
    names = {path: getattr(box, "names", ()) for path, box in boxes.items()}
    active = sum(size * _active(path, names[path], part) for path, size in sizes.items())
    return EncoderCost(count(traced.jaxpr) / 2, sum(sizes.values()), round(active))


def check(costs: Mapping[str, ArmCost], equal: Sequence[str], tolerance: float) -> None:
    """Refuses arms that do not have the same budget.

    Args:
      costs: by the names of the arms; the first is what the others are compared with.
      equal: fields of ``ArmCost``.
      tolerance: share of the first arm's cost by which another may differ.

    Raises:
      ConfigError: names the arm, the budget, and both figures.
    """
    (first, reference), *others = costs.items()
    for name in equal:
        allowed = getattr(reference, name)
        for arm, cost in others:
            found = getattr(cost, name)
            if abs(found - allowed) > tolerance * allowed:
                raise ConfigError(
                    f"arm {arm!r}: its budget differs: {name} {found:,.6g}, {first!r} has {allowed:,.6g} "
                    f"(tolerance {tolerance:.3g} of it); make them equal, or take {name!r} out of equal"
                )


def _active(path: str, names: Collection[str | None], parts: stacks.Stacks) -> float:
    """The share of a parameter that one token meets: of routed experts, those it is sent to.

    Args:
      names: of the parameter's dimensions.
    """
    if "experts" not in names:
        return 1.0
    for stack in parts.values():
        if any(path.startswith("/".join(run) + "/") for run in stack.runs):
            return stack.moe.top_k / stack.moe.num_experts
    return 1.0


def _forward(layout: Layout, stage: Stage, example: Any) -> float:
    """Operations of the objective on one batch of a stage."""
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


def _with_countable_kernel(config: Any) -> Any:
    """A config whose routed experts are computed by plain JAX, which can be traced on every platform."""
    if isinstance(config, ExecutionConfig):
        return dataclasses.replace(config, kernel="blocked", exchange="all_gather")
    if isinstance(config, tuple):
        return tuple(_with_countable_kernel(part) for part in config)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    parts = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    changed = {name: _with_countable_kernel(part) for name, part in parts.items()}
    changed = {
        name: part for name, part in changed.items() if part is not parts[name] and part != parts[name]
    }
    return dataclasses.replace(config, **changed) if changed else config
