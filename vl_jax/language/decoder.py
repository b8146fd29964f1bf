"""The language model: pre-norm decoder, each layer dense or sparse.

    x -> [gate: + what vision says] -> + attention(norm) -> + SwiGLU or experts(norm) -> ... -> norm

Consecutive layers of one kind are stacked and scanned: parameters, routing state, cache and statistics carry
a leading layer axis, so compile time does not grow with depth. With ``scan_layers`` off every stack holds one
layer: decoding on a CPU then reads weights where they lie, while a scan copies each layer's out of the stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vl_jax import losses
from vl_jax.fusion.budget import Decided, Openings
from vl_jax.fusion.gate import CrossModalGateConfig
from vl_jax.language.decoder_config import DEPTHS, DecoderConfig, LayerRun
from vl_jax.language.decoder_layer import DecoderLayer, LayerContext, LayerState, PassableLayer
from vl_jax.moe.layer import (
    MoEOutput,
    carried_apart,
    carry,
    logits_before,
)
from vl_jax.moe.routing import MoEConfig, State
from vl_jax.nn import packed
from vl_jax.nn.cache import Cache
from vl_jax.nn.embedding import look_up
from vl_jax.nn.layers import Linear, RMSNorm, as_used, named
from vl_jax.params import Leaf
from vl_jax.sharding import constrain

REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


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
        kind = PassableLayer if run.depths else DecoderLayer
        layer = packed.layer_of(kind, self, run.name, remat=remat != "none", policy=policy)
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
            (``moe.layers``), or tokens may pass layers by, that of every group, by its name.
          cache: what attention kept of the tokens before, or None in training.
          looks: as ``looks`` gives them, where rows decide.

        Returns:
          Hidden states after the final norm, what the sparse layers returned (stacked; in groups as their
          state), what attention keeps of the new tokens, for each run of layers (see ``cache.append``), and
          what gates decided (stacked over all layers), if they have a budget.
        """
        windows = jnp.array(self.config.windows, jnp.int32) if self.config.windows else None
        cached = [None] * len(self.runs) if cache is None or cache.empty else cache.runs
        alike = not {*self.groups, *([DEPTHS] if self.config.passable else [])} - {""}
        states: Any = {"": routing_state} if alike else routing_state
        kept, decided = [], []
        routed: dict[str, list[MoEOutput]] = {name: [] for name in (*self.groups, DEPTHS)}
        first = dict.fromkeys(routed, 0)
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
                depth=_cut(states[DEPTHS], first[DEPTHS], len(run.layers)) if run.depths else None,
            )
            previous = previous if moe is None else logits_before(moe, previous, x.shape[:2])
            carried, (kept_here, routed_here, decided_here, passed) = stack(
                carry(x, previous), state, context
            )
            x, previous = carried_apart(carried)
            kept.append(kept_here)
            decided += [] if decided_here is None else [decided_here]
            if run.sparse:
                routed[run.group].append(routed_here)
                first[run.group] += len(run.layers)
            if run.depths:
                routed[DEPTHS].append(passed)
                first[DEPTHS] += len(run.layers)
        outputs = {name: _stacked(trees) for name, trees in routed.items() if trees}
        given = outputs.get("") if alike else outputs
        return self.norm(x), given, tuple(kept), _stacked(decided) if decided else None


def _cut(state: State, first: int, count: int) -> State:
    """The state of some of the layers of a group."""
    return jax.tree.map(lambda a: a[first : first + count], state)


def _stacked(trees: list[Any]) -> Any:
    """Trees of several runs as one, joined along the layer axis."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *trees)
