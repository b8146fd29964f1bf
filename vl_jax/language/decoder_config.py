"""The sizes of the decoder, and how its layers are stacked."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Literal

from vl_jax.kernels.activation import SWIGLU, Activation
from vl_jax.language.depths import DepthsConfig
from vl_jax.language.gqa import GQAConfig
from vl_jax.language.mla import MLAConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.moe.stacks import Stack
from vl_jax.moe.varied import per_layer
from vl_jax.moe.varied.per_layer import Group

DEPTHS = "_depths"  # behind the name of a part, for the stack of the routers of its layers


@dataclasses.dataclass(frozen=True)
class LayerRun:
    """Consecutive layers of one kind, whose parameters are stacked under one name."""

    name: str
    sparse: bool
    layers: tuple[int, ...]
    group: str = ""  # of a sparse run: which of ``per_layer.groups`` its layers are of
    depths: bool = False  # whether tokens may pass its layers by


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Defaults are DeepSeek-VL2 (base)."""

    vocab_size: int = 129_280
    embed_dim: int = 2560
    mlp_dim: int = 12_288  # hidden width of the dense layers
    num_layers: int = 30
    num_dense_layers: int = 1  # the first layers, without experts
    other_dense_layers: tuple[int, ...] = ()  # further layers without experts, by number
    attention: MLAConfig | GQAConfig = MLAConfig()
    windows: tuple[int, ...] = ()  # for every layer the tokens it looks back on, 0: all; (): all, everywhere
    activation: Activation = SWIGLU  # of the dense layers
    mlp_bias: bool = False
    norm_epsilon: float = 1e-6
    tie_embeddings: bool = False  # the head is the embedding table
    scan_layers: bool = True  # False: each layer has parameters of its own; see the top of the file
    remat: Literal["none", "full", "dots"] = "none"
    depths: DepthsConfig | None = None  # layers that tokens may pass by; None: none

    def __post_init__(self):
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise ValueError(
                f"num_dense_layers={self.num_dense_layers} must be from 0 to num_layers={self.num_layers}"
            )
        if not all(0 <= i < self.num_layers for i in self.other_dense_layers):
            raise ValueError(
                f"other_dense_layers={self.other_dense_layers} must be from 0 to {self.num_layers - 1}"
            )
        if self.windows and (len(self.windows) != self.num_layers or min(self.windows) < 0):
            raise ValueError(
                f"windows={self.windows} must be num_layers={self.num_layers} numbers >= 0, or empty"
            )
        if self.depths is not None:
            self.depths.check(self.num_layers, self.windows)

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The numbers of the layers with experts."""
        dense = {*range(self.num_dense_layers), *self.other_dense_layers}
        return tuple(i for i in range(self.num_layers) if i not in dense)

    @property
    def passable(self) -> tuple[int, ...]:
        """The numbers of the layers that tokens may pass by."""
        return () if self.depths is None else tuple(sorted(self.depths.layers))

    def check_experts(self, moe: MoEConfig) -> None:
        """Refuses settings of layers that have no experts.

        Raises:
          ValueError: names the setting.
        """
        per_layer.check_layers(moe, self.sparse_layers, "moe")

    def groups_of(self, moe: MoEConfig) -> dict[str, Group]:
        """The sparse layers by equal settings."""
        return per_layer.groups(moe, self.sparse_layers)

    def stacks_of(self, moe: MoEConfig, part: str) -> dict[str, Stack]:
        """The stacks of sparse layers, for a decoder that a model has under the name ``part``.

        Those that differ from the main ones (``moe.layers``) are stacks of their own, and so are the routers
        of layers that tokens may pass by.
        """
        groups, found = self.groups_of(moe), {}
        for name, group in groups.items():
            runs = (run.name for run in self.runs_of(groups) if run.sparse and run.group == name)
            places = tuple((part, run, "moe") for run in runs)
            found[part + name] = Stack(group.moe, group.layers, places, self.activation)
        if self.depths is not None and self.passable:
            runs = (run.name for run in self.runs_of(groups) if run.depths)
            places = tuple((part, run, "depth") for run in runs)
            found[part + DEPTHS] = Stack(self.depths.router, self.passable, places)
        return found

    @property
    def runs(self) -> tuple[LayerRun, ...]:
        """The layers in order, all sparse ones alike."""
        return self.runs_of({"": Group(None, self.sparse_layers)})

    def runs_with(self, moe: MoEConfig) -> tuple[LayerRun, ...]:
        """The layers in order, with these experts."""
        return self.runs_of(self.groups_of(moe))

    def runs_of(self, groups: Mapping[str, Group]) -> tuple[LayerRun, ...]:
        """The layers in order; from the second run of a kind on, a number follows its name.

        Args:
          groups: the sparse layers, by ``per_layer.groups``.
        """
        sparse = {layer: name for name, group in groups.items() for layer in group.layers}
        runs: list[LayerRun] = []

        def together(layer: int) -> tuple[str | None, bool, int]:
            return sparse.get(layer), layer in self.passable, 0 if self.scan_layers else layer

        for (group, passed, _), layers in itertools.groupby(range(self.num_layers), key=together):
            kind = "dense_layers" if group is None else "moe_layers"
            earlier = sum(r.sparse == (group is not None) for r in runs)
            name = f"{kind}_{earlier}" if earlier else kind
            runs.append(LayerRun(name, group is not None, tuple(layers), group or "", passed))
        return tuple(runs)
