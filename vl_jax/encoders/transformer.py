"""The transformer that encoders of images, texts and sounds share, whatever stands before and after it.

Every block is ``x + attention(norm1(x))``, then ``x + fc2(activation(fc1(norm2(x))))``; with norms behind the
sums, ``norm1(x + attention(x))``, then ``norm2(x + fc2(activation(fc1(x))))``. In a sparse block experts take
the place of the two projections. Consecutive blocks of one kind are stacked and scanned.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from vl_jax.kernels.activation import FUNCTIONS, Activation, Kind
from vl_jax.moe.layer import (
    Carried,
    DynamicMoE,
    MoEOutput,
    carried_apart,
    carry,
    first_logits,
    handed_on,
    of_layer,
)
from vl_jax.moe.routing import MoEConfig, RoutingContext, State
from vl_jax.moe.stacks import Stack
from vl_jax.nn import attention, packed
from vl_jax.nn.layers import LayerNorm, Linear, as_used, fan_in, named
from vl_jax.params import Leaf
from vl_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class BlockRun:
    """Consecutive blocks of one kind, whose parameters are stacked under one name."""

    name: str
    sparse: bool
    layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """The blocks of an encoder."""

    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    activation: Kind
    norm_epsilon: float
    qkv_bias: bool = True
    key_bias: bool = (
        True  # whether keys have one too; it changes no output, and some published models lack it
    )
    moe: MoEConfig | None = None
    sparse_layers: tuple[int, ...] = ()  # numbers of the blocks with experts, ascending
    norms_follow: bool = False  # norms take the sums, as in BERT; else what is added to them reads norms

    def __post_init__(self):
        if self.num_heads < 1 or self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim={self.embed_dim} is not a multiple of num_heads={self.num_heads}")
        sparse, last = self.sparse_layers, self.num_layers - 1
        if any(not 0 <= i <= last for i in sparse) or any(i >= j for i, j in itertools.pairwise(sparse)):
            raise ValueError(f"sparse_layers={sparse} must be ascending numbers from 0 to {last}")
        if sparse and self.moe is None:
            raise ValueError(f"sparse_layers={sparse} needs moe, the config of their experts")
        if self.moe is not None and not sparse:
            raise ValueError(f"moe needs sparse_layers, numbers from 0 to {last}; sparse_layers=() has none")

        if self.moe is not None and self.moe.layers:
            raise ValueError(f"moe.layers={self.moe.layers}: the sparse blocks of an encoder have one config")

    @classmethod
    def of(cls, config: Any, **others: Any) -> BlockConfig:
        """The blocks of an encoder, by the fields of its config that have the names of these.

        Args:
          others: fields that the config does not have.
        """
        names = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: getattr(config, name) for name in names if hasattr(config, name)}, **others)

    @property
    def runs(self) -> tuple[BlockRun, ...]:
        """The blocks in order; from the second run of a kind on, a number follows its name."""
        runs: list[BlockRun] = []
        for sparse, group in itertools.groupby(range(self.num_layers), key=self.sparse_layers.__contains__):
            kind = "moe_blocks" if sparse else "blocks"
            earlier = sum(run.sparse == sparse for run in runs)
            runs.append(BlockRun(f"{kind}_{earlier}" if earlier else kind, sparse, tuple(group)))
        return tuple(runs)

    @property
    def stack(self) -> Stack | None:
        """The sparse blocks, in the module that runs them."""
        if self.moe is None:
            return None
        runs = tuple((run.name, "moe") for run in self.runs if run.sparse)
        return Stack(self.moe, self.sparse_layers, runs, Activation(self.activation, gated=False))


@struct.dataclass
class Encoded:
    """What an encoder makes of its input."""

    tokens: Leaf  # [B T D], the features; or what else the method says that returns it
    pooled: Leaf  # [B E], the input as one vector; or None
    states: tuple[Leaf, ...] = ()  # [B T D] each: the hidden states that the config asks for
    routed: MoEOutput | None = None  # of the sparse layers, stacked; None where there are none
    maps: tuple[Leaf, ...] = ()  # [B h w D] each: what an image looks like, from the finest to the coarsest
    mask: Leaf = None  # bool[B T] tokens that are there; None: those of valid inputs


def from_grid(features: Float[Array, "M u v D"], maps: tuple[Leaf, ...] = ()) -> Encoded:
    """The cells of a grid as tokens, row by row, and their mean; with ``maps`` of several resolutions."""
    pooled = jnp.mean(features.astype(jnp.float32), axis=(1, 2)).astype(features.dtype)
    return Encoded(features.reshape(features.shape[0], -1, features.shape[-1]), pooled, maps=maps)


class Attention(nn.Module):
    """Multi-head attention from ``x`` to ``source``, or to ``x`` itself."""

    num_heads: int
    qkv_bias: bool = True
    key_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        source: Float[Array, "B S D"] | None = None,
        *,
        mask: Bool[Array, "B #T S"] | None = None,
        bias: Float[Array, "1 N T S"] | None = None,
    ) -> Float[Array, "B T D"]:
        """The mixture; ``bias`` is added to the scaled scores."""
        width, heads = x.shape[-1], self.num_heads
        shape = (width, 3, heads, width // heads)
        init = named(fan_in(), "embed", None, "heads", None, inputs=(0,))
        qkv = as_used(self.param("qkv", init, shape), x.dtype, "embed", None, "heads", None, rows=x.shape[0])
        offset = jnp.zeros(shape[1:], x.dtype)
        if self.qkv_bias and self.key_bias:
            init = named(nn.initializers.zeros, None, "heads", None)
            offset = self.param("qkv_bias", init, shape[1:]).astype(x.dtype)
        elif self.qkv_bias:
            init = named(nn.initializers.zeros, None, "heads", None)
            given = self.param("qv_bias", init, (2, *shape[2:])).astype(x.dtype)
            offset = jnp.stack([given[0], jnp.zeros_like(given[0]), given[1]])
        if source is None:
            query, key, value = jnp.einsum("BTD,DXNH->XBTNH", x, qkv) + offset[:, None, None]
        else:
            query = jnp.einsum("BTD,DNH->BTNH", x, qkv[:, 0]) + offset[0]
            key, value = jnp.einsum("BSD,DXNH->XBSNH", source, qkv[:, 1:]) + offset[1:, None, None]
        scale = query.shape[-1] ** -0.5
        if bias is None:
            mixed = attention.attend(query, key, value, mask=mask, scale=scale)
            if self.is_mutable_collection("intermediates"):
                weights = attention.attention_weights(query, key, mask=mask, scale=scale)
                self.sow("intermediates", "weights", weights)
        else:
            scores = attention.dot_products(query, key) * scale + bias
            weights = attention.masked_softmax(scores, None if mask is None else mask[:, None])
            self.sow("intermediates", "weights", weights)
            mixed = attention.weighted_sum(weights, value)
        self.sow("intermediates", "mixed", mixed)
        init = named(fan_in(in_axis=(0, 1)), "heads", None, "embed", inputs=(0, 1))
        project = self.param("project", init, (heads, width // heads, width))
        project = as_used(project, x.dtype, "heads", None, "embed", rows=x.shape[0])
        offset = self.param("project_bias", named(nn.initializers.zeros, "embed"), (width,)).astype(x.dtype)
        return jnp.einsum("BTNH,NHD->BTD", mixed, project) + offset


def feed_forward(x: Float[Array, "*batch D"], config: BlockConfig) -> Float[Array, "*batch D"]:
    """Two projections, ``fc1`` and ``fc2``, that belong to the module which calls this."""
    hidden = Linear(config.mlp_dim, ("embed", "mlp"), use_bias=True, name="fc1")(x)
    hidden = FUNCTIONS[config.activation](hidden)
    return Linear(config.embed_dim, ("mlp", "embed"), use_bias=True, name="fc2")(hidden)


@struct.dataclass
class BlockInputs:
    """What belongs to one block and is not a parameter; stacked over blocks outside the scan."""

    routing: State  # state of the routing scheme; empty for a dense block
    number: Leaf  # i32[] of the block among all


class Block(nn.Module):
    """One block; ``keep`` returns its output once more, for a scan to stack."""

    config: BlockConfig
    sparse: bool = False
    keep: bool = False

    @nn.compact
    def __call__(
        self,
        carried: Carried,
        state: BlockInputs,
        mask: Bool[Array, "B #T T"] | None,
        context: RoutingContext | None,
        bias: Float[Array, "1 N T T"] | None = None,
    ) -> tuple[Carried, tuple[Float[Array, "B T D"] | None, MoEOutput | None]]:
        """Takes and returns x [B T D], with the router logits that are handed on if anyone asks for them."""
        (x, previous), c = carried_apart(carried), self.config
        if context is not None:
            context = of_layer(context, previous, state.number, c.num_layers)
        norm1, norm2 = (LayerNorm(c.norm_epsilon, name=name) for name in ("norm1", "norm2"))
        attend = Attention(c.num_heads, c.qkv_bias, c.key_bias, name="attention")
        if c.norms_follow:
            x = norm1(x + attend(x, mask=mask, bias=bias))
            y, routed = self._feed_forward(x, state.routing, context)
            x = norm2(x + y)
        else:
            x = x + attend(norm1(x), mask=mask, bias=bias)
            y, routed = self._feed_forward(norm2(x), state.routing, context)
            x = x + y
        x = constrain(x, "batch", None, None)
        if routed is not None:
            previous, routed = handed_on(routed)
        return carry(x, previous), (x if self.keep else None, routed)

    def _feed_forward(
        self, x: Float[Array, "B T D"], state: State, context: RoutingContext | None
    ) -> tuple[Float[Array, "B T D"], MoEOutput | None]:
        if not self.sparse:
            return feed_forward(x, self.config), None
        assert self.config.moe is not None and context is not None
        return DynamicMoE(self.config.moe, name="moe")(x, context, state)


def routing_context(
    valid: Bool[Array, "B T"],
    *,
    modality: int,
    tokens: Int[Array, "B T"] | None = None,
    content: UInt32[Array, " B"] | None = None,
) -> RoutingContext:
    """What routing may look at in rows of one modality; ``content`` is that of ``noise.content_of``."""
    positions = jnp.arange(valid.shape[1], dtype=jnp.int32)
    return RoutingContext(
        valid=valid,
        modality=jnp.full(valid.shape, modality, jnp.int32),
        tokens=tokens,
        positions=jnp.broadcast_to(positions, valid.shape),
        content=content,
    )


# What the blocks of an encoder go through where something acts between them: from the tokens that enter the
# first, and a function that runs the block of a number on some tokens, to those that leave the last.
Through = Callable[[jax.Array, Callable[[int, jax.Array], jax.Array]], jax.Array]


def run_blocks(
    x: Float[Array, "B T D"],
    mask: Bool[Array, "B #T T"] | None,
    config: BlockConfig,
    *,
    bias: Float[Array, "1 N T T"] | None = None,
    context: RoutingContext | None = None,
    routing_state: State | None = None,
    states: tuple[int, ...] = (),
    remat: bool = False,
    through: Through | None = None,
    owner: nn.Module,
) -> tuple[Float[Array, "B T D"], tuple[Float[Array, "B T D"], ...], MoEOutput | None]:
    """Runs the blocks, whose parameters belong to ``owner``, the module which calls this.

    Args:
      bias: what is added to the scores of every block.
      context: needed where there are sparse blocks; every row is a routing group.
      routing_state: state of the scheme, stacked over the sparse blocks; None: empty.
      states: hidden states to return too: 0 is the input, i the output of block i, negative ones count
        from the last.
      remat: keep only the inputs of blocks for the backward pass.
      through: acts between the blocks, which have no experts then; hidden states are those before it acts.

    Returns:
      The output of the last block, the hidden states, and what the sparse blocks returned, stacked.
    """
    numbers = [i % (config.num_layers + 1) for i in states]
    if through is not None:
        return _one_by_one(x, mask, config, through=through, numbers=numbers, remat=remat, owner=owner)
    hidden, routed, first_sparse = {0: x}, [], 0
    carried = carry(x, first_logits(config.moe, x.shape[:2]))
    for run in config.runs:
        stack = nn.scan(
            packed.layer_of(Block, owner, run.name, remat=remat),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "routing": True},  # "routing": noise of schemes, in training
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=len(run.layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        own = slice(first_sparse, first_sparse + len(run.layers) * run.sparse)
        state = jax.tree.map(lambda a, s=own: a[s], routing_state or {}) if run.sparse else {}
        first_sparse = own.stop
        run_context = context if run.sparse else None
        blocks = stack(config, run.sparse, bool(states), name=run.name)
        inputs = BlockInputs(state, jnp.array(run.layers, jnp.int32))
        carried, (kept, here) = blocks(carried, inputs, mask, run_context, bias)
        routed += [here] * run.sparse
        if kept is not None:
            hidden |= {layer + 1: kept[i] for i, layer in enumerate(run.layers) if layer + 1 in numbers}
    together = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *routed) if routed else None
    return carried_apart(carried)[0], tuple(hidden[i] for i in numbers), together


def _one_by_one(
    x: jax.Array,
    mask: jax.Array | None,
    config: BlockConfig,
    *,
    through: Through,
    numbers: list[int],
    remat: bool,
    owner: nn.Module,
) -> tuple[jax.Array, tuple[jax.Array, ...], None]:
    """The blocks without a scan, each when it is asked for; their parameters exist already."""
    hidden = {0: x}
    (run,) = config.runs

    def block(number: int, x: jax.Array) -> jax.Array:
        layer = packed.layer_of(Block, owner, run.name, remat=remat)(config, parent=None)
        params = jax.tree.map(lambda leaf: leaf[number], owner.variables["params"][run.name])
        state = BlockInputs({}, jnp.int32(number))
        x, _ = layer.apply({"params": params}, x, state, mask, None)  # pyright: ignore[reportAssignmentType]
        hidden[number + 1] = x
        return x

    x = through(x, block)
    return x, tuple(hidden[i] for i in numbers), None
