"""The language model: pre-norm decoder, each layer dense or sparse.

    x -> [gate: + what vision says] -> + attention(norm) -> + SwiGLU or experts(norm) -> ... -> norm

Consecutive layers of one kind are stacked and scanned: parameters, routing state, cache and statistics carry
a leading layer axis, so compile time does not grow with depth. With ``scan_layers`` off every stack holds one
layer: decoding on a CPU then reads weights where they lie, while a scan copies each layer's out of the stack.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vl_jax import losses
from vl_jax.fusion.budget import Decided, Openings
from vl_jax.fusion.gate import CrossModalGate, CrossModalGateConfig, SkippingGate
from vl_jax.kernels.activation import SWIGLU, Activation
from vl_jax.language.gqa import GQA, GQAConfig
from vl_jax.language.mla import MLA, MLAConfig
from vl_jax.moe import per_layer
from vl_jax.moe.layer import (
    Carried,
    DynamicMoE,
    MoEOutput,
    carried_apart,
    carry,
    handed_on,
    logits_before,
    of_layer,
)
from vl_jax.moe.per_layer import Group
from vl_jax.moe.routing import MoEConfig, RoutingContext, State
from vl_jax.moe.stacks import Stack
from vl_jax.nn import packed
from vl_jax.nn.cache import Cache
from vl_jax.nn.embedding import look_up
from vl_jax.nn.layers import GatedMLP, Linear, RMSNorm, as_used, named
from vl_jax.nn.masks import within_window
from vl_jax.params import Leaf
from vl_jax.sharding import constrain

REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class LayerRun:
    """Consecutive layers of one kind, whose parameters are stacked under one name."""

    name: str
    sparse: bool
    layers: tuple[int, ...]
    group: str = ""  # of a sparse run: which of ``per_layer.groups`` its layers are of


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

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The numbers of the layers with experts."""
        dense = {*range(self.num_dense_layers), *self.other_dense_layers}
        return tuple(i for i in range(self.num_layers) if i not in dense)

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

        Those that differ from the main ones (``moe.layers``) are stacks of their own.
        """
        groups, found = self.groups_of(moe), {}
        for name, group in groups.items():
            runs = (run.name for run in self.runs_of(groups) if run.sparse and run.group == name)
            found[part + name] = Stack(group.moe, group.layers, tuple((part, run, "moe") for run in runs))
        return found

    @property
    def runs(self) -> tuple[LayerRun, ...]:
        """The layers in order, all sparse ones alike."""
        return self.runs_of({"": Group(None, self.sparse_layers)})

    def runs_of(self, groups: Mapping[str, Group]) -> tuple[LayerRun, ...]:
        """The layers in order; from the second run of a kind on, a number follows its name.

        Args:
          groups: the sparse layers, by ``per_layer.groups``.
        """
        sparse = {layer: name for name, group in groups.items() for layer in group.layers}
        runs: list[LayerRun] = []

        def together(layer: int) -> tuple[str | None, int]:
            return sparse.get(layer), 0 if self.scan_layers else layer

        for (group, _), layers in itertools.groupby(range(self.num_layers), key=together):
            kind = "dense_layers" if group is None else "moe_layers"
            earlier = sum(r.sparse == (group is not None) for r in runs)
            name = f"{kind}_{earlier}" if earlier else kind
            runs.append(LayerRun(name, group is not None, tuple(layers), group or ""))
        return tuple(runs)


@struct.dataclass
class LayerContext:
    """What every layer reads and none changes."""

    positions: Leaf  # i32[B T]
    mask: Leaf  # a ``PackedMask``, or bool[B T T]; with slots of a cache bool[B T S+T]
    routing: RoutingContext
    vision: Leaf | None  # [B S D] visual tokens, for the gate; None: there are none, and no gate runs
    vision_mask: Leaf | None  # bool[B T S]
    length: Leaf | None  # i32[] filled slots of the cache; None: there is none to keep anything in
    learning: bool = struct.field(pytree_node=False, default=False)  # gates with a budget are to learn


@struct.dataclass
class LayerState:
    """What belongs to one layer and is not a parameter; stacked over layers outside the scan."""

    routing: State  # state of the routing scheme; empty for a dense layer
    cached: Leaf | None  # what the cache keeps for this layer, unless it is empty
    window: Leaf | None  # i32[] tokens the layer looks back on, 0: all
    number: Leaf  # i32[] of the layer among all
    looks: Leaf | None = None  # f32[B] logits of the rows that are to look; None: nobody decides for a row


class DecoderLayer(nn.Module):
    """One decoder layer; ``moe`` None makes it dense."""

    config: DecoderConfig
    moe: MoEConfig | None
    gate: CrossModalGateConfig | None

    @nn.compact
    def __call__(
        self, carried: Carried, state: LayerState, context: LayerContext
    ) -> tuple[Carried, tuple[Leaf | None, MoEOutput | None, Decided | None]]:
        """Takes and returns x [B T D], with the router logits that are handed on if anyone asks for them."""
        (x, previous), c = carried_apart(carried), self.config
        x, decided = self._look(x, state, context)
        mask, length = context.mask, context.length
        if state.window is not None:
            mask = within_window(mask, state.window, offset=0 if length is None else length)
        attention = MLA if isinstance(c.attention, MLAConfig) else GQA
        mixed, kept = attention(c.attention, name="attention")(  # pyright: ignore[reportArgumentType]
            RMSNorm(c.norm_epsilon, name="attention_norm")(x),
            positions=context.positions,
            mask=mask,
            cached=state.cached,
        )
        x = constrain(x + mixed, "batch", None, None)
        normed = RMSNorm(c.norm_epsilon, name="mlp_norm")(x)
        routed = None
        if self.moe is None:
            y = GatedMLP(c.mlp_dim, c.activation, c.mlp_bias, name="mlp")(normed)
        else:
            where = of_layer(context.routing, previous, state.number, c.num_layers)
            y, routed = DynamicMoE(self.moe, name="moe")(normed, where, state.routing)
            previous, routed = handed_on(routed)
        x = constrain(x + y, "batch", None, None)
        return carry(x, previous), (None if length is None else kept, routed, decided)

    def _look(
        self, x: jax.Array, state: LayerState, context: LayerContext
    ) -> tuple[jax.Array, Decided | None]:
        """What vision says is added, and what a gate with a budget decided comes with it."""
        if self.gate is None or context.vision is None:
            return x, None
        assert context.vision_mask is not None
        if self.gate.budget is None:
            return x + CrossModalGate(self.gate, name="gate")(x, context.vision, context.vision_mask), None
        found, decided = SkippingGate(self.gate, name="gate")(
            x, context.vision, context.vision_mask, state.looks, learning=context.learning
        )
        return x + found, decided


class Decoder(nn.Module):
    """Embeddings in, normalised hidden states out; ``embed`` and ``logits`` are its two ends."""

    config: DecoderConfig
    moe: MoEConfig
    gate: CrossModalGateConfig | None
    dtype: jnp.dtype = jnp.dtype(jnp.float32)

    def setup(self):
        c = self.config
        init = named(nn.initializers.normal(0.02), "vocab", "embed")
        self.embedding = self.param("embedding", init, (c.vocab_size, c.embed_dim))
        self.groups = c.groups_of(self.moe)
        self.runs = c.runs_of(self.groups)
        self.stacks = [self._stack(run) for run in self.runs]
        self.norm = RMSNorm(c.norm_epsilon)
        if not c.tie_embeddings:
            self.head = Linear(c.vocab_size, ("embed", "vocab"), hidden=False)
        budget = None if self.gate is None else self.gate.budget
        if budget is not None and budget.grain != "token":
            self.gate_looks = Openings(c.num_layers if budget.grain == "layer" else 1)

    def looks(self, tokens: Int[Array, "B T"], words: Bool[Array, "B T"]) -> Float[Array, "B L"]:
        """How far every row is to look in each layer, as logits, from the words that count."""
        logits = self.gate_looks(self.embed(tokens), words)
        return jnp.broadcast_to(logits, (logits.shape[0], self.config.num_layers))

    def _stack(self, run: LayerRun) -> nn.Module:
        remat = self.config.remat
        policy = REMAT_POLICIES.get(remat)
        layer = packed.layer_of(DecoderLayer, self, run.name, remat=remat != "none", policy=policy)
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "routing": True},  # "routing": noise of schemes, in training
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=len(run.layers),
            unroll=True if len(run.layers) == 1 else 1,  # no loop, out of which XLA would move nothing
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        moe = self.groups[run.group].moe if run.sparse else None
        return scanned(self.config, moe, self.gate, name=run.name)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return look_up(as_used(self.embedding, self.dtype, "vocab", "embed"), tokens)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Vocabulary scores in float32."""
        if self.config.tie_embeddings:
            scores = hidden @ self.embedding.astype(hidden.dtype).T
        else:
            scores = self.head(hidden)
        return constrain(scores.astype(jnp.float32), "batch", None, "vocab")

    def cross_entropy(
        self, hidden: Float[Array, "B Q D"], targets: Int[Array, "B Q"], weights: Float[Array, "B Q"]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The weighted sums of cross-entropy and of hits of the vocabulary scores."""
        tied = self.config.tie_embeddings
        kernel = self.embedding.T if tied else self.head.variables["params"]["kernel"]
        kernel = as_used(kernel, hidden.dtype, "embed", "vocab")
        return losses.head_cross_entropy(hidden, kernel, targets, weights)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: LayerContext,
        routing_state: State | Mapping[str, State],
        cache: Cache | None,
        looks: Float[Array, "B L"] | None = None,
    ) -> tuple[
        Float[Array, "B T D"],
        MoEOutput | dict[str, MoEOutput] | None,
        tuple[Leaf, ...],
        Decided | None,
    ]:
        """Runs the layers.

        Args:
          routing_state: state of the scheme, stacked over the sparse layers; where these differ
            (``moe.layers``) that of every group, by its name.
          cache: what attention kept of the tokens before, or None in training.
          looks: as ``looks`` gives them, where rows decide.

        Returns:
          Hidden states after the final norm, what the sparse layers returned (stacked; in groups as their
          state), what attention keeps of the new tokens, for each run of layers (see ``cache.append``), and
          what gates decided (stacked over all layers), if they have a budget.
        """
        windows = jnp.array(self.config.windows, jnp.int32) if self.config.windows else None
        cached = [None] * len(self.runs) if cache is None or cache.empty else cache.runs
        alike = len(self.groups) < 2
        states: Mapping[str, State] = {"": routing_state} if alike else routing_state
        kept, decided = [], []
        routed: dict[str, list[MoEOutput]] = {name: [] for name in self.groups}
        first = dict.fromkeys(self.groups, 0)
        previous = None
        for run, stack, before in zip(self.runs, self.stacks, cached, strict=True):
            layers = slice(run.layers[0], run.layers[-1] + 1)
            moe = self.groups[run.group].moe if run.sparse else None
            state = LayerState(
                routing=_cut(states[run.group], first[run.group], len(run.layers)) if run.sparse else {},
                cached=before,
                window=None if windows is None else windows[layers],
                number=jnp.array(run.layers, jnp.int32),
                looks=None if looks is None else looks.T[layers],
            )
            previous = previous if moe is None else logits_before(moe, previous, x.shape[:2])
            carried, (kept_here, routed_here, decided_here) = stack(carry(x, previous), state, context)
            x, previous = carried_apart(carried)
            kept.append(kept_here)
            decided += [] if decided_here is None else [decided_here]
            if run.sparse:
                routed[run.group].append(routed_here)
                first[run.group] += len(run.layers)
        outputs = {name: _stacked(trees) for name, trees in routed.items()}
        given = outputs.get("") if alike else outputs
        return self.norm(x), given, tuple(kept), _stacked(decided) if decided else None


def _cut(state: State, first: int, count: int) -> State:
    """The state of some of the layers of a group."""
    return jax.tree.map(lambda a: a[first : first + count], state)


def _stacked(trees: list[Any]) -> Any:
    """Trees of several runs as one, joined along the layer axis."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)
