"""What a stage computes, apart from the loop that runs it.

    Program.of(layout, stage)
        .begin(variables, key) -> state              fresh adapters and moments, frozen weights in int8
        .step(state, batch, learning rate, limit)    compiled; consumes the state; see ``guard``
        .step_of(seed)                               the same, not compiled, with another noise of routing
        .merge(state)                                adapters added to their weights
        .abstract_params, .abstract_optimizer        what a checkpoint of the stage holds

Stages that differ only in what they read, how long and how fast they train share one compiled step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from vl_jax import params as params_lib
from vl_jax.compress import quantize
from vl_jax.layout import Layout, Variables
from vl_jax.moe import stacks
from vl_jax.train import lora
from vl_jax.train.guard import GuardedStep, guarded
from vl_jax.train.optimizer import make_optimizer, without_schedule
from vl_jax.train.specialise.chosen import Masks
from vl_jax.train.stages import (
    Stage,
    adapter_shapes,
    expert_masks,
    held_modules,
    int8_paths,
    trainable_paths,
)
from vl_jax.train.step import TrainState, gradient_names, make_train_step, split_trained
from vl_jax.train.updates import average
from vl_jax.train.updates.groups import group_names


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The computations of one stage."""

    layout: Layout
    stage: Stage
    trainable: set[str]  # paths of the parameters that train
    adapters: dict[str, Any]  # shapes of the adapters, where each lives; empty without any
    optimizer: optax.GradientTransformation
    step_of: Callable[[ArrayLike], GuardedStep]  # with a seed for the noise of routing; not compiled
    step: GuardedStep  # that of the program's seed, compiled when it is first called; consumes its state

    @classmethod
    def of(cls, layout: Layout, stage: Stage, others: Iterable[Program] = (), *, seed: int = 0) -> Program:
        """The program of a stage.

        Args:
          others: programs of the same layout and seed, whose step it takes if it would compile the same.
          seed: of the noise of routing.

        Raises:
          ValueError: a pattern of the stage matches no parameter, or its settings contradict each other.
        """
        trainable = trainable_paths(stage, layout.params)
        adapters = adapter_shapes(stage, layout.params, layout.roles)
        factors = params_lib.flatten(adapters)
        roles = layout.roles | dict.fromkeys(factors, lora.FACTOR)
        stacked = _stacked(layout, factors)
        plain = stage.gradients is not None and stage.gradients.at == "update"
        shapes = params_lib.flatten(layout.params) | factors
        layers = {path: shapes[path].shape[0] for path in stacked}
        optimizer = make_optimizer(
            stage.optimizer, trainable | factors.keys(), roles, layers=layers, plain=plain
        )
        same = next((p for p in others if computation(p.stage) == computation(stage)), None)
        if same is not None:
            return cls(layout, stage, trainable, adapters, optimizer, same.step_of, same.step)
        held = held_modules(stage, layout.params, factors)
        masks = expert_masks(stage, layout.params, layout.roles, layout.model.config.stacks)
        step_of = functools.partial(_step_of, layout, stage, trainable, optimizer, stacked, held, masks)
        step = jax.jit(step_of(seed), donate_argnums=0)
        return cls(layout, stage, trainable, adapters, optimizer, step_of, step)

    @property
    def gradient_names(self) -> list[str]:
        """What the single gradient norms of a step are of: a leaf, or a layer of it."""
        trained, _ = split_trained(self.layout.params, self.adapters, self.trainable)
        return gradient_names(trained, _stacked(self.layout, params_lib.flatten(self.adapters)))

    @property
    def int8(self) -> set[str]:
        """Paths of the weights that the stage keeps in int8."""
        return int8_paths(self.stage, self.layout.params, self.layout.roles)

    @property
    def abstract_params(self) -> Any:
        """Shapes and shardings of the parameters, as the stage keeps them."""
        return quantize.shapes(self.layout.params, self.int8, self.layout.roles)

    @property
    def abstract_optimizer(self) -> Any:
        """Shapes and shardings of the optimiser state: moments live where their parameters live."""
        return self._beside(self.optimizer.init)

    @property
    def abstract_averages(self) -> Any:
        """Shapes and shardings of the average of what trains; empty if the stage keeps none."""
        return self._beside(average.init) if self.stage.optimizer.average else {}

    def _beside(self, init: Callable[[Any], Any]) -> Any:
        """Shapes and shardings of what is made of the leaves that train, and has a part for each."""
        trained, _ = split_trained(self.layout.params, self.adapters, self.trainable)
        shardings = {path: leaf.sharding for path, leaf in params_lib.flatten(trained).items()}

        def placed(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
            # A moment hangs in the state under the keys of its parameter, whatever stands before them.
            keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
            ends = ("/".join(keys[start:]) for start in range(len(keys)))
            sharding = next((shardings[end] for end in ends if end in shardings), self.layout.replicated)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(placed, jax.eval_shape(init, trained))

    def first_fusing(self) -> dict[str, Any]:
        """What gradient fusion remembers at the beginning of the stage; empty without any."""
        way = self.stage.gradients
        return {} if way is None else way.init(group_names(self.stage.objective))

    @property
    def abstract_fusing(self) -> dict[str, Any]:
        """Its shapes."""
        whole = functools.partial(jax.ShapeDtypeStruct, sharding=self.layout.replicated)
        return jax.tree.map(lambda x: whole(x.shape, x.dtype), self.first_fusing())

    @property
    def abstract_state(self) -> TrainState:
        """Shapes and shardings of the state, for a step that is compiled before there is one."""
        whole = functools.partial(jax.ShapeDtypeStruct, sharding=self.layout.replicated)
        parts = self.layout.model.config.stacks
        beside = jax.eval_shape(lambda: (stacks.init_state(parts), stacks.init_load(parts)))
        routing, load = jax.tree.map(lambda x: whole(x.shape, x.dtype), beside)
        return TrainState(
            whole((), jnp.int32),
            self.abstract_params,
            self.abstract_optimizer,
            routing,
            self.adapters,
            self.layout.collections,
            load,
            self.abstract_fusing,
            self.abstract_averages,
        )

    def begin(self, variables: Variables, key: jax.Array) -> TrainState:
        """The state at the beginning: fresh adapters, and fresh optimiser state for all that trains.

        Weights that the stage keeps in int8 are taken from ``variables`` one by one, so that memory never
        holds all of them twice.
        """
        layout, params, adapters = self.layout, self._in_int8(variables.params), {}
        if self.stage.lora is not None:
            init = functools.partial(lora.init, self.stage.lora, layout.params, layout.roles)
            adapters = jax.jit(init, out_shardings=_shardings(self.adapters))(key)
        trained, _ = split_trained(params, adapters, self.trainable)
        moments = jax.jit(self.optimizer.init, out_shardings=_shardings(self.abstract_optimizer))(trained)
        rest = (
            jnp.zeros((), jnp.int32),
            variables.routing,
            dict(variables.collections),
            stacks.init_load(layout.model.config.stacks),
            self.first_fusing(),
        )
        placed = jax.tree.map(functools.partial(_placed, sharding=layout.replicated), rest)
        step, routing, collections, load, fusing = placed
        averages = {}
        if self.stage.optimizer.average:
            averages = jax.jit(average.init, out_shardings=_shardings(self.abstract_averages))(trained)
        return TrainState(step, params, moments, routing, adapters, collections, load, fusing, averages)

    def _in_int8(self, params: Any) -> Any:
        flat, shapes = params_lib.flatten(params), params_lib.flatten(self.abstract_params)
        for path in sorted(self.int8):
            weight = flat.pop(path)
            targets = tuple(shapes[f"{path}/{part}"].sharding for part in quantize.PARTS)
            small = jax.jit(quantize.quantize, static_argnums=1, out_shardings=targets)
            made = jax.block_until_ready(small(weight, self.layout.roles[path]))
            flat |= {f"{path}/{part}": x for part, x in zip(quantize.PARTS, made, strict=True)}
            weight.delete()
        return params_lib.unflatten(flat)

    def merge(self, state: TrainState, *, averaged: bool = False) -> TrainState:
        """The state with its adapters added to their weights, and none left; it consumes ``state``.

        Weights that were in int8 are floating-point numbers again, those that it stands for.

        Args:
          averaged: takes the average of what trains in the place of it.

        Raises:
          ValueError: the stage keeps no average.
        """
        if averaged:
            state = average.averaged(state, self.stage.optimizer.average)
        if self.stage.lora is None:
            return state
        layout, config = self.layout, self.stage.lora
        paths = self.int8 | set(lora.targets(config, layout.params, layout.roles))
        kept = {f"{path}/{part}" for path in paths for part in quantize.PARTS}
        weights, rest = params_lib.split(state.params, paths | kept)
        wanted = params_lib.split(layout.params, paths)[0]

        def add(weights: Any, adapters: Any) -> Any:
            merged = lora.merge(weights, adapters, config.scale, layout.roles, config.only)
            return jax.tree.map(lambda x, like: x.astype(like.dtype), merged, wanted)

        donated = () if self.int8 else 0  # int8 is no room for floating-point numbers
        weights = jax.jit(add, donate_argnums=donated, out_shardings=_shardings(wanted))(
            weights, state.adapters
        )
        return dataclasses.replace(state, params=params_lib.merge(weights, rest), adapters={})


def programs(layout: Layout, stages: Iterable[Stage], *, seed: int = 0) -> tuple[Program, ...]:
    """The program of every stage; those that compute the same have one step."""
    made: list[Program] = []
    for stage in stages:
        made.append(Program.of(layout, stage, made, seed=seed))
    return tuple(made)


def computation(stage: Stage) -> Stage:
    """The stage with everything at rest that its compiled step does not depend on.

    What is named here makes no difference to the step, or is an argument of it; whatever a stage may have
    besides counts. The number of rows is a shape, by which ``jit`` compiles anew itself.
    """
    return dataclasses.replace(
        stage,
        name="",
        steps=1,
        batch_size=stage.accumulation,
        sources=(),
        weights=(),
        targets="all",
        optimizer=without_schedule(stage.optimizer),
    )


def _step_of(
    layout: Layout,
    stage: Stage,
    trainable: set[str],
    optimizer: optax.GradientTransformation,
    stacked: set[str],
    held: set[str],
    masks: Masks,
    seed: ArrayLike,
) -> GuardedStep:
    step = make_train_step(
        layout.model,
        optimizer,
        trainable=trainable,
        accumulation=stage.accumulation,
        lora_scale=stage.lora_scale,
        lora_only=stage.lora_only,
        objective=stage.objective,
        roles=layout.roles,
        stacked=stacked,
        seed=seed,
        held=held,
        chosen=stage.experts,
        masks=masks,
        way=stage.gradients,
    )
    for wrapper in stage.wrap:
        step = wrapper(step)
    if stage.optimizer.average:
        step = average.averaging(step, stage.optimizer.average, trainable)
    return guarded(step)


def _stacked(layout: Layout, adapters: Iterable[str]) -> set[str]:
    """The parameters, and the adapters of such, whose first axis counts layers."""
    found = {path for path, placement in layout.placements.items() if placement.names[:1] == ("layers",)}
    return found | {path for path in adapters if path.rpartition("/")[0] in found}


def _placed(x: ArrayLike, sharding: jax.sharding.Sharding) -> jax.Array:
    """``jax.device_put``, also where several processes have one device each.

    There its result holds, with jax 0.10.2, the whole array in place of the shard, and cannot be saved.
    """
    if sharding.is_fully_addressable:
        # Also what lies there already: under another name of its place, the next step would compile anew.
        return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim):
        return x
    value = np.asarray(x)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
