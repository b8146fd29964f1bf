"""What an arm costs, counted before it runs: steps, samples, tokens, parameters, floating-point operations.

Nothing is computed and no parameter allocated: the objective is traced, and the products in it are counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.encoders.build import AnyEncoder
from vl_jax.experiment import Experiment, example_batch, plan
from vl_jax.fit.flops import STEP_PASSES, count, countable, forward_flops
from vl_jax.moe import stacks
from vl_jax.schema import ConfigError


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
    experiment = countable(experiment)
    layout = plan(experiment)
    example = example_batch(experiment, sharding.batch_axes(layout.mesh))
    length, known, flops = example.tokens.shape[1], dict[Any, float](), 0.0
    for stage in experiment.stages:
        key = (stage.objective, stage.batch_size)
        if key not in known:
            known[key] = forward_flops(layout, stage, example)
        flops += STEP_PASSES * stage.steps * known[key]
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
    config = countable(config)
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
