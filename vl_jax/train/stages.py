"""A training stage is data: what it reads and predicts, which leaves it trains, how long and how fast."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import numpy as np

from vl_jax import params as params_lib
from vl_jax.compress import quantize
from vl_jax.moe.stacks import Stacks
from vl_jax.nn.low_rank import EVERYWHERE, Only
from vl_jax.roles import Role
from vl_jax.schema import Open
from vl_jax.train import lora
from vl_jax.train.lora import LoraConfig
from vl_jax.train.objectives.next_token import NextToken
from vl_jax.train.objectives.together import AnyObjective
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.specialise import chosen as experts
from vl_jax.train.step import StepWrapper
from vl_jax.train.updates.build import AnyFusing
from vl_jax.train.updates.fusing import GradientFusion
from vl_jax.train.updates.groups import group_names


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run; the loop knows none of them by name."""

    name: str
    steps: int
    batch_size: int = 64  # rows of the global batch
    accumulation: int = 1  # micro-batches per optimiser step
    sources: tuple[str, ...] = ()  # names in ``data.sources``; empty: all of them
    weights: tuple[float, ...] = ()  # of the mixture; empty: equal
    targets: Literal["all", "answers"] = "answers"  # which text tokens are predicted
    trainable: tuple[str, ...] = (".*",)  # patterns of parameter paths; the rest is frozen
    experts: tuple[
        int, ...
    ] = ()  # of every sparse layer, those that train; empty: all (see ``train.specialise.chosen``)
    hold: bool = False  # routing state too stays as it is in top-level modules of which nothing trains
    lora: LoraConfig | None = None  # adapters on frozen weights, merged into them when the stage ends
    objective: AnyObjective = NextToken()  # what it minimises
    gradients: AnyFusing | None = None  # how those of groups of losses become one; None: they are added up
    optimizer: OptimizerConfig = OptimizerConfig()
    # What changes the step, from the inside to the outside.
    wrap: tuple[Annotated[StepWrapper, Open("step wrapper", ("__call__",))], ...] = ()

    @property
    def lora_scale(self) -> float:
        """What adapters are multiplied by when they are merged."""
        return 1.0 if self.lora is None else self.lora.scale

    @property
    def lora_only(self) -> Only:
        """The layers and experts that have adapters."""
        return EVERYWHERE if self.lora is None else self.lora.only

    def __post_init__(self):
        if self.steps < 1 or self.batch_size < 1 or self.accumulation < 1:
            raise ValueError(
                f"steps={self.steps}, batch_size={self.batch_size}, accumulation={self.accumulation}: "
                "each must be >= 1"
            )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of accumulation={self.accumulation}"
            )
        if self.objective.couples_rows and self.accumulation > 1:
            raise ValueError(
                f"accumulation={self.accumulation}: rows act on one another under "
                f"{type(self.objective).__name__}, so the batch cannot be cut; it must be 1"
            )
        if self.gradients is not None:
            self._check_gradients(self.gradients)
        if len(set(self.experts)) < len(self.experts):
            raise ValueError(f"experts={self.experts} names an expert twice")
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(f"{len(self.weights)} weights for {len(self.sources)} sources")

    def _check_gradients(self, way: GradientFusion) -> None:
        names = group_names(self.objective)
        if len(names) < 2:
            raise ValueError(
                f"gradients={type(way).__name__} with the one group {''.join(names)!r} of "
                f"{type(self.objective).__name__}: must be None, or the losses of two groups or more"
            )
        if way.at == "update" and self.optimizer.method != "adamw":
            raise ValueError(
                f"gradients.at='update' with optimizer.method={self.optimizer.method!r}: must be 'gradient', "
                "or the method 'adamw'"
            )
        way.init(names)  # it says which names it does not know


def trainable_paths(stage: Stage, params: params_lib.Tree) -> set[str]:
    """The leaves the stage trains.

    Raises:
      ValueError: a pattern matches no parameter; the message names the stage.
    """
    try:
        return params_lib.select(params, stage.trainable)
    except ValueError as error:
        raise ValueError(f"config.stages.{stage.name}.trainable: {error}") from None


def held_modules(stage: Stage, params: params_lib.Tree, adapted: Iterable[str] = ()) -> set[str]:
    """The top-level modules whose routing state stays, because the stage trains nothing in them.

    Args:
      adapted: paths of the adapters that the stage trains.
    """
    if not stage.hold:
        return set()
    trains = {path.split("/")[0] for path in (*trainable_paths(stage, params), *adapted)}
    return set(params) - trains


def adapter_shapes(stage: Stage, params: params_lib.Tree, roles: Mapping[str, Role]) -> dict[str, Any]:
    """Shapes of the adapters that the stage trains, laid out as their weights are; empty without any.

    Raises:
      ValueError: a target matches no weight matrix, one that the stage trains itself, or one that lacks a
        layer or expert; names the stage.
    """
    if stage.lora is None:
        return {}
    where = f"config.stages.{stage.name}"
    try:
        targets = lora.targets(stage.lora, params, roles)
    except ValueError as error:
        names = ", ".join(lora.GROUPS)
        raise ValueError(f"{where}.lora.targets: {error} (names for patterns: {names})") from None
    try:
        shapes = lora.shapes(stage.lora, params, roles)
    except ValueError as error:
        raise ValueError(f"{where}.lora.{error}") from None
    both = sorted(trainable_paths(stage, params).intersection(targets))
    if both:
        raise ValueError(
            f"{where}.lora.targets: {both[0]} trains itself, by {where}.trainable={stage.trainable}; "
            "trainable=() trains adapters alone"
        )
    return shapes


def int8_paths(stage: Stage, params: params_lib.Tree, roles: Mapping[str, Role]) -> set[str]:
    """The weights that the stage keeps in int8: all hidden matrices that it does not train, or none."""
    if stage.lora is None or stage.lora.base == "float":
        return set()
    return quantize.select(params, roles) - trainable_paths(stage, params)


def expert_masks(
    stage: Stage, params: params_lib.Tree, roles: Mapping[str, Role], stacks: Stacks
) -> experts.Masks:
    """What may change of the leaves that the stage trains, where that is not all of them.

    Raises:
      ValueError: there is no such expert, or nothing of it trains; the message names the stage.
    """
    adapters = params_lib.flatten(adapter_shapes(stage, params, roles))
    paths = trainable_paths(stage, params) | adapters.keys()
    try:
        return experts.masks(stage.experts, paths, params, stacks)
    except ValueError as error:
        raise ValueError(f"config.stages.{stage.name}.experts: {error}") from None


NO_STACKS: Stacks = {}


def trainable_table(
    stage: Stage, params: params_lib.Tree, roles: Mapping[str, Role], stacks: Stacks = NO_STACKS
) -> list[tuple[str, int, int]]:
    """(module, its parameters, how many of them train), adapters included, for modules two levels deep.

    Args:
      stacks: of the model; needed where the stage trains some experts alone.
    """
    adapters = params_lib.flatten(adapter_shapes(stage, params, roles))
    paths = trainable_paths(stage, params) | adapters.keys()
    masks = expert_masks(stage, params, roles, stacks)
    rows: dict[str, tuple[int, int]] = {}
    for path, leaf in (params_lib.flatten(params) | adapters).items():
        module = "/".join(path.split("/")[:2])
        total, trains = rows.get(module, (0, 0))
        share = masks[path] if path in masks else np.ones(1, bool)
        own = leaf.size // share.size * int(np.count_nonzero(share))
        rows[module] = (total + leaf.size, trains + own * (path in paths))
    return [(module, total, trains) for module, (total, trains) in rows.items()]
