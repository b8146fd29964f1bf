"""Adaptive input and output of large vocabularies: rare words have narrow vectors, and their scores wait.

    word of cluster i -> its row of table i [V_i E_i] -> projection i -> * sqrt(D)
    hidden [D] -> projection i, transposed -> table i -> scores;
        log p(word) = log p(cluster i) + log p(word | cluster i), whose first term the first cluster lacks

Words are numbered by frequency, so clusters are ranges of ids. Input: Baevski and Auli 2018,
arXiv 1809.10853; output: Grave et al. 2016, arXiv 1609.04309; both in the form of Transformer-XL.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl_jax.nn.layers import fan_in, named


@dataclasses.dataclass(frozen=True)
class AdaptiveConfig:
    """Which words have vectors of which width. Defaults are Transformer-XL's for WikiText-103."""

    vocab_size: int = 267_735
    cutoffs: tuple[int, ...] = (20_000, 40_000, 200_000)  # the first word of each cluster but the first
    embed_dim: int = 1024  # width of the vectors of the first cluster
    shrink: int = 4  # by which the width falls from one cluster to the next; 1: one table of one width
    tied: bool = True  # the tables of the input score the output too
    # Which clusters project their output by the projection of their input; empty: none.
    tied_projections: tuple[bool, ...] = (False, True, True, True)

    def __post_init__(self):
        bounds = self.bounds
        if any(a >= b for a, b in itertools.pairwise(bounds)) or min(bounds[1:]) < 1:
            raise ValueError(
                f"cutoffs={self.cutoffs} must be ascending numbers from 1 to vocab_size={self.vocab_size} - 1"
            )
        if self.shrink < 1 or self.embed_dim // self.shrink ** len(self.cutoffs) < 1:
            raise ValueError(
                f"shrink={self.shrink} must be >= 1 and leave the last of {len(bounds) - 1} clusters width; "
                f"embed_dim={self.embed_dim}"
            )

    @property
    def bounds(self) -> tuple[int, ...]:
        """Cluster i has the ids from ``bounds[i]`` to ``bounds[i + 1] - 1``."""
        return (0, *self.cutoffs, self.vocab_size)

    @property
    def tables(self) -> tuple[tuple[int, int], ...]:
        """Words and width of each table: one a cluster, or one in all."""
        if self.shrink == 1:
            return ((self.vocab_size, self.embed_dim),)
        sizes = (end - start for start, end in itertools.pairwise(self.bounds))
        return tuple((size, self.embed_dim // self.shrink**i) for i, size in enumerate(sizes))

    def projects(self, width: int) -> bool:
        """Whether vectors have to be brought to the width of the model."""
        return self.shrink > 1 or self.embed_dim != width

    def shares_projection(self, cluster: int) -> bool:
        """Whether a cluster projects its output as its input."""
        return self.tied_projections[cluster : cluster + 1] == (True,)


Cluster = tuple[Any, Any]  # its table, and its projection or None


class AdaptiveEmbedding(nn.Module):
    """Ids to vectors."""

    config: AdaptiveConfig
    width: int  # of the model
    dtype: jnp.dtype = jnp.dtype(jnp.float32)

    def setup(self):
        c, init = self.config, named(nn.initializers.normal(0.02), "vocab", "embed")
        self.tables = [self.param(f"table{i}", init, shape) for i, shape in enumerate(c.tables)]
        init = named(fan_in(), None, "embed", inputs=(0,))
        shapes = [(size, self.width) for _, size in c.tables] if c.projects(self.width) else []
        self.projections = [self.param(f"project{i}", init, shape) for i, shape in enumerate(shapes)]

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The vector of every id."""
        c, parts = self.config, []
        for i, table in enumerate(self.tables):
            start, end = (c.bounds[i], c.bounds[i + 1]) if c.shrink > 1 else (0, c.vocab_size)
            vectors = table.astype(self.dtype)[jnp.clip(tokens - start, 0, end - start - 1)]
            if self.projections:
                vectors = vectors @ self.projections[i].astype(self.dtype)
            inside = (tokens >= start) & (tokens < end)
            parts.append(jnp.where(inside[..., None], vectors, 0))
        return sum(parts[1:], parts[0]) * jnp.asarray(self.width**0.5, self.dtype)

    def clusters(self) -> list[Cluster]:
        """Table and projection of every cluster."""
        projections = list(self.projections) or [None] * len(self.tables)
        if self.config.shrink == 1:
            projections = projections * (len(self.config.bounds) - 1)
        return list(zip(_by_cluster(self.tables, self.config), projections, strict=True))


def _by_cluster(arrays: Sequence[jax.Array], config: AdaptiveConfig) -> list[jax.Array]:
    """Rows by cluster, of one array a cluster or of one for all."""
    if config.shrink > 1:
        return list(arrays)
    return [arrays[0][start:end] for start, end in itertools.pairwise(config.bounds)]


class AdaptiveSoftmax(nn.Module):
    """Hidden states to the logarithm of the probability of every word, in float32."""

    config: AdaptiveConfig

    @nn.compact
    def __call__(self, hidden: Float[Array, "B T D"], shared: list[Cluster]) -> Float[Array, "B T V"]:
        """Words in the order of their ids.

        Args:
          shared: what the embedding has of every cluster; it is used as far as the config says.
        """
        scores = self._scores(hidden, shared)
        first = self.config.bounds[1]
        head = jax.nn.log_softmax(scores[0])  # words of the first cluster, and every other cluster
        tails = [head[..., first + i, None] + jax.nn.log_softmax(s) for i, s in enumerate(scores[1:])]
        return jnp.concatenate([head[..., :first], *tails], axis=-1)

    def _scores(self, hidden: jax.Array, shared: list[Cluster]) -> list[jax.Array]:
        """Of every cluster's words, and, behind those of the first, of the other clusters."""
        c, scores = self.config, []
        tables = [table for table, _ in shared] if c.tied else self._own("table", "embed")
        for i, (table, bias) in enumerate(zip(tables, self._own("bias"), strict=True)):
            if i == 0 and c.cutoffs:
                init = named(nn.initializers.normal(0.02), None, "embed")
                others = self.param("clusters", init, (len(c.cutoffs), c.embed_dim))
                more = self.param("clusters_bias", named(nn.initializers.zeros, None), (len(c.cutoffs),))
                table, bias = jnp.concatenate([table, others]), jnp.concatenate([bias, more])
            x, projection = hidden, shared[i][1]
            if projection is not None:
                if not c.shares_projection(i):
                    init = named(fan_in(in_axis=1), None, "embed", inputs=(1,), outputs=(0,))
                    projection = self.param(f"project{i}", init, projection.shape)
                x = x @ projection.astype(x.dtype).T
            scores.append((x @ table.astype(x.dtype).T).astype(jnp.float32) + bias)
        return scores

    def _own(self, name: str, *wide: str) -> list[jax.Array]:
        """Parameters with a row, or a number, for every word, by cluster."""
        init = named(nn.initializers.normal(0.02) if wide else nn.initializers.zeros, "vocab", *wide)
        shapes = [shape[: 1 + len(wide)] for shape in self.config.tables]
        arrays = [self.param(f"{name}{i}", init, shape) for i, shape in enumerate(shapes)]
        return _by_cluster(arrays, self.config)
