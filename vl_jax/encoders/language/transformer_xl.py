"""Transformer-XL (Dai et al. 2019, arXiv 1901.02860): a causal text encoder that remembers what it read.

    memory  [N M D] (what entered each block, of the M tokens before)
               |
    tokens [T] -> embed -> block 0 -> ... -> block N - 1 -> tokens [T D]

    block: x attends to (memory, x), norm behind the sum; feed-forward, norm behind the sum
    score(i, j) = (q_i + u) . k_j + (q_i + v) . r_(i - j)         r: a projected sinusoid of the distance

As a tower a text is one segment with nothing before it. As a reader, ``segment`` takes a text piece by piece
with what it remembers. No gradient goes into a memory.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from vl_jax.encoders.language.adaptive import AdaptiveConfig, AdaptiveEmbedding, AdaptiveSoftmax, Cluster
from vl_jax.encoders.language.tower import ReadsText, check_length
from vl_jax.encoders.transformer import Encoded
from vl_jax.moe.routing import State
from vl_jax.nn import attention, packed
from vl_jax.nn.layers import LayerNorm, Linear, fan_in, named
from vl_jax.params import Leaf
from vl_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class TransformerXLConfig(ReadsText):
    """Defaults are those of the paper's large model on WikiText-103, with a memory of 1,024 tokens."""

    words: AdaptiveConfig = AdaptiveConfig()
    max_length: int = 1024  # tokens of the longest segment
    embed_dim: int = 1024
    mlp_dim: int = 4096
    num_layers: int = 18
    num_heads: int = 16
    head_dim: int = 64
    memory: int = 1024  # tokens that are remembered
    farthest: int = 1000  # distances beyond count as this one; 0: every distance counts
    same_length: bool = False  # a token sees ``memory`` tokens, itself the last; else all there are
    norms_follow: bool = True  # norms take the sums; else what is added to them reads norms
    share_biases: bool = False  # all blocks have the same two vectors u and v
    norm_epsilon: float = 1e-5
    # At the beginning of a text: nothing is remembered, or zeros are, which are attended to like tokens. So
    # published models begin.
    remember_zeros: bool = False

    def __post_init__(self):
        least = min(self.max_length, self.num_layers, self.num_heads, self.head_dim)
        if least < 1 or min(self.memory, self.farthest) < 0:
            raise ValueError(
                f"max_length={self.max_length}, num_layers={self.num_layers}, num_heads={self.num_heads}, "
                f"head_dim={self.head_dim} must be >= 1, memory={self.memory} and farthest={self.farthest} "
                ">= 0"
            )
        if self.embed_dim % 2:
            raise ValueError(f"embed_dim={self.embed_dim}: must be even, half sine and half cosine")
        if self.same_length and not self.memory:
            raise ValueError("same_length=True needs a memory, as a token sees so many")

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary."""
        return self.words.vocab_size

    @property
    def stack(self) -> None:
        """No layers with experts."""
        return None

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> TransformerXL:
        """The module."""
        return TransformerXL(self, jnp.dtype(dtype), remat)


@struct.dataclass
class Memory:
    """What is remembered of the tokens before a segment, the last one last."""

    states: Leaf  # [N B M D] what entered each block
    valid: Leaf  # bool[B M] that there is such a token

    @classmethod
    def empty(cls, config: TransformerXLConfig, rows: int, dtype: DTypeLike = jnp.float32) -> Memory:
        """That of a text of which nothing is read yet."""
        states = jnp.zeros((config.num_layers, rows, config.memory, config.embed_dim), dtype)
        return cls(states, jnp.full((rows, config.memory), config.remember_zeros))

    def after(self, entered: Float[Array, "N B T D"], valid: Bool[Array, "B T"]) -> Memory:
        """The memory of as many tokens once a segment is read, without gradient."""
        size = self.valid.shape[1]
        states = jnp.concatenate([self.states, entered.astype(self.states.dtype)], axis=2)
        seen = jnp.concatenate([self.valid, valid], axis=1)
        start = seen.shape[1] - size
        return Memory(jax.lax.stop_gradient(states[:, :, start:]), seen[:, start:])


def distance_waves(count: int, width: int, *, farthest: int) -> Float[np.ndarray, "S D"]:
    """Sinusoids of the distances from ``count - 1`` down to 0: all sines, then all cosines."""
    distances = np.arange(count - 1, -1, -1.0)
    if farthest:
        distances = np.minimum(distances, farthest)
    angles = np.outer(distances, 10_000 ** (-np.arange(0, width, 2) / width))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def shift_to_keys(x: Float[Array, "B N T S"]) -> Float[Array, "B N T S"]:
    """Scores by distance as scores by key: query i of the last T of S tokens, key j.

    Entry s of a query stands for distance S - 1 - s; what comes out for keys after the query means nothing.
    Padding by a column and reading the rows anew moves row i by T - 1 - i (the paper's appendix B).
    """
    batch, heads, length, keys = x.shape
    padded = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (1, 0)))
    return padded.reshape(batch, heads, keys + 1, length)[:, :, 1:].reshape(x.shape)


def keys_in_reach(length: int, before: int, config: TransformerXLConfig) -> Bool[np.ndarray, "T S"]:
    """Which of the tokens before and of the segment each token may see."""
    query = before + np.arange(length)[:, None]
    key = np.arange(before + length)
    reach = key <= query
    return reach & (key > query - config.memory) if config.same_length else reach


class DistanceAttention(nn.Module):
    """Attention from a segment to itself and to what stands before it, by content and by distance."""

    config: TransformerXLConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        source: Float[Array, "B S D"],
        waves: Float[Array, "S D"],
        mask: Bool[Array, "B T S"],
        biases: Leaf | None,
    ) -> Float[Array, "B T D"]:
        """The mixture.

        Args:
          source: what stands before, and the segment.
          biases: u and v [2 N H]; None: the block has its own.
        """
        c, width = self.config, x.shape[-1]
        heads, size = c.num_heads, c.head_dim
        init = named(fan_in(), "embed", None, "heads", None, inputs=(0,))
        qkv = self.param("qkv", init, (width, 3, heads, size)).astype(x.dtype)
        init = named(fan_in(), "embed", "heads", None, inputs=(0,))
        by_distance = self.param("distance", init, (width, heads, size)).astype(x.dtype)
        if biases is None:
            biases = self.param("biases", *distance_biases(c))
        content, distance = jnp.asarray(biases, x.dtype)
        query = jnp.einsum("BTD,DNH->BTNH", x, qkv[:, 0])
        key, value = jnp.einsum("BSD,DXNH->XBSNH", source, qkv[:, 1:])
        waves = jnp.einsum("SD,DNH->SNH", waves.astype(x.dtype), by_distance)
        far = jnp.einsum("BTNH,SNH->BNTS", query + distance, waves, preferred_element_type=jnp.float32)
        scores = attention.dot_products(query + content, key) + shift_to_keys(far)
        weights = attention.masked_softmax(scores * size**-0.5, mask[:, None])
        self.sow("intermediates", "weights", weights)
        mixed = attention.weighted_sum(weights, value)
        init = named(fan_in(in_axis=(0, 1)), "heads", None, "embed", inputs=(0, 1))
        output = self.param("output", init, (heads, size, width)).astype(x.dtype)
        return jnp.einsum("BTNH,NHD->BTD", mixed, output)


def distance_biases(config: TransformerXLConfig) -> tuple:
    """Initialiser and shape of u and v, for ``Module.param``."""
    shape = (2, config.num_heads, config.head_dim)
    return named(nn.initializers.normal(0.02), None, "heads", None), shape


class DistanceBlock(nn.Module):
    """One block; its input is returned once more, to be remembered."""

    config: TransformerXLConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        before: Leaf,
        waves: Float[Array, "S D"],
        mask: Bool[Array, "B T S"],
        biases: Leaf | None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        c, entered = self.config, x
        norm1, norm2 = (LayerNorm(c.norm_epsilon, name=name) for name in ("norm1", "norm2"))
        attend = DistanceAttention(c, name="attention")
        source = jnp.concatenate([jnp.asarray(before, x.dtype), x], axis=1)
        if c.norms_follow:
            x = norm1(x + attend(x, source, waves, mask, biases))
            x = norm2(x + self._feed_forward(x))
        else:
            normed = norm1(source)
            x = x + attend(normed[:, -x.shape[1] :], normed, waves, mask, biases)
            x = x + self._feed_forward(norm2(x))
        return constrain(x, "batch", None, None), entered

    def _feed_forward(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        hidden = Linear(self.config.mlp_dim, ("embed", "mlp"), use_bias=True, name="fc1")(x)
        return Linear(x.shape[-1], ("mlp", "embed"), use_bias=True, name="fc2")(nn.relu(hidden))


class TransformerXL(nn.Module):
    """The encoder: a tower, and a reader of segments."""

    config: TransformerXLConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False

    def setup(self):
        c = self.config
        self.embedding = AdaptiveEmbedding(c.words, c.embed_dim, self.dtype)
        self.biases = self.param("biases", *distance_biases(c)) if c.share_biases else None
        self.blocks = nn.scan(
            packed.layer_of(DistanceBlock, self, "blocks", remat=self.remat),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        valid: Bool[Array, "B T"] | None = None,
        routing_state: State | None = None,
    ) -> Encoded:
        """Encodes rows of tokens as texts that begin with them; see ``segment``.

        Args:
          routing_state: not read, as there are no experts.
        """
        memory = Memory.empty(self.config, len(tokens), self.dtype)
        if not self.config.remember_zeros:  # nothing to look at
            memory = Memory(memory.states[:, :, :0], memory.valid[:, :0])
        return self._read(tokens, memory, valid)[0]

    def segment(
        self, tokens: Int[Array, "B T"], memory: Memory, valid: Bool[Array, "B T"] | None = None
    ) -> tuple[Encoded, Memory]:
        """Reads the next tokens of some texts.

        Args:
          memory: of the tokens before; ``Memory.empty`` at the beginning.
          valid: tokens that may be attended to; None: all of them.

        Returns:
          The tokens, and the memory for the next segment.

        Raises:
          ValueError: the segment is too long.
        """
        encoded, entered, there = self._read(tokens, memory, valid)
        return encoded, memory.after(entered, there)

    def _read(
        self, tokens: Int[Array, "B T"], memory: Memory, valid: Bool[Array, "B T"] | None
    ) -> tuple[Encoded, Float[Array, "N B T D"], Bool[Array, "B T"]]:
        c, length, before = self.config, tokens.shape[1], memory.valid.shape[1]
        check_length(length, c.max_length)
        there = jnp.ones(tokens.shape, bool) if valid is None else valid
        mask = jnp.concatenate([memory.valid, there], axis=1)[:, None] & keys_in_reach(length, before, c)
        x = constrain(self.embedding(tokens), "batch", None, None)
        self.sow("intermediates", "embedded", x)
        waves = jnp.asarray(distance_waves(before + length, c.embed_dim, farthest=c.farthest))
        states = jax.lax.stop_gradient(memory.states)
        x, entered = self.blocks(x, states, waves, mask, self.biases)
        return Encoded(x, None), entered, there

    def clusters(self) -> list[Cluster]:
        """What the embedding has of every cluster of words, for ``AdaptiveSoftmax``."""
        return self.embedding.clusters()


class NextWord(nn.Module):
    """The encoder as a language model: the logarithm of the probability of each next word."""

    config: TransformerXLConfig

    def setup(self):
        self.encoder = self.config.build("float32")
        self.words = AdaptiveSoftmax(self.config.words)

    def __call__(
        self, tokens: Int[Array, "B T"], memory: Memory
    ) -> tuple[Float[Array, "B T V"], Encoded, Memory]:
        """Of a segment the log-probabilities of the word after each token, the tokens, and the memory."""
        encoded, memory = self.encoder.segment(tokens, memory)
        return self.words(encoded.tokens, self.encoder.clusters()), encoded, memory
