"""Experts that begin as copies of a dense block (sparse upcycling, arXiv 2212.05055), or of pieces of it.

    dense block   [D I H] hidden units    | piece 0 | piece 1 |
    experts       e = copy * G + piece      0 2 4 ..   1 3 5 ..      G = H / expert_dim pieces

A token's experts say together what the block said if the gates of each piece sum to the same, whatever the
token: outputs are divided by that sum. It is not read off a scheme's name but tried out. Columns of a new
router are alike for the pieces of one copy, so that these are chosen together (virtual groups, arXiv
2410.07524, section 3). Where gates are no shares of the chosen, columns begin so small that gates are even.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vl_jax.moe import routing
from vl_jax.moe.assignment import ExpertChoice, Merge, RoutingContext, TokenChoice, weights_of
from vl_jax.moe.routing import MoEConfig

EVEN = 1e-6  # of the usual size: what the columns of a router are where gates have to be even
TOLERANCE = 1e-5  # by which sums of gates may differ, of their mean
_GROUPS, _LENGTH = 4, 256  # of what is tried
_SHIFTS = (-4.0, 4.0, *[0.0] * 6)  # of all logits of a token, by turns


@dataclasses.dataclass(frozen=True)
class UpcyclingConfig:
    """How the experts of a model begin where the checkpoint of ``init`` has dense blocks."""

    noise: float = 0.0  # added to copies: its standard deviation, over that of the block's numbers

    def __post_init__(self):
        if not 0 <= self.noise < float("inf"):
            raise ValueError(f"noise={self.noise} of copies must be >= 0 and finite")


@dataclasses.dataclass(frozen=True)
class Copies:
    """How experts are cut out of a dense block."""

    pieces: int  # that the hidden units are cut into
    gate: float  # what the gates of a piece sum to
    router: float | None  # size of the router's columns, over the usual one; None: they begin as ever


def copies(config: MoEConfig, *, width: int, mlp_dim: int) -> Copies:
    """How the experts of a layer begin as copies of a dense block.

    Args:
      width: of the model.
      mlp_dim: hidden units of the block.

    Raises:
      ValueError: together they would not say what the block says; one line.
    """
    pieces, rest = divmod(mlp_dim, config.expert_dim)
    if rest or not pieces:
        raise ValueError(
            f"expert_dim={config.expert_dim} must divide the {mlp_dim} hidden units of the block"
        )
    if config.num_experts % pieces:
        raise ValueError(
            f"num_experts={config.num_experts} must be a multiple of the {pieces} pieces that expert_dim="
            f"{config.expert_dim} cuts the {mlp_dim} hidden units of the block into"
        )
    if config.simple.num:
        raise ValueError(f"simple has {config.simple.num} experts without matrices, which copy no block")
    scheme = routing.scheme_of(config)
    linear = scheme.logits is None and scheme.by_expert and scheme.columns(config) == config.num_experts
    found = _sums(config, width, pieces, size=1.0)
    if _even(found) and (pieces == 1 or linear):
        return Copies(pieces, float(found.mean()), None if pieces == 1 else 1.0)
    if linear:
        found = _sums(config, width, pieces, size=EVEN)
        if _even(found):
            return Copies(pieces, float(found.mean()), EVEN)
    of = "" if pieces == 1 else f" for each of {pieces} pieces"
    raise ValueError(
        f"scheme={config.scheme!r}: a token's gates sum to {found.min():.3g} to {found.max():.3g}{of}, and "
        "copies say what the block says only if that is the same for all tokens; gates.normalize=True with "
        f"scheme='top_k' and top_k a multiple of {pieces} is"
    )


def _even(sums: np.ndarray) -> bool:
    return bool(sums.min() > 0 and sums.max() - sums.min() <= TOLERANCE * sums.mean())


def _sums(config: MoEConfig, width: int, pieces: int, *, size: float) -> np.ndarray:
    """What gates sum to, for every token and piece, in training and in evaluation.

    Args:
      size: of the logits.

    Raises:
      ValueError: the scheme mixes tokens.
    """
    scheme, random = routing.scheme_of(config), np.random.default_rng(0)
    shape = (_GROUPS, _LENGTH, scheme.columns(config) // pieces)
    shifts = np.resize(np.asarray(_SHIFTS, np.float32), _LENGTH)[:, None]
    logits = np.repeat(size * (random.standard_normal(shape, np.float32) + shifts), pieces, axis=-1)
    logits = np.pad(logits, ((0, 0), (0, 0), (0, scheme.columns(config) - logits.shape[-1])))
    context = _context(config, width, random)
    state, found = routing.init_state(config), []
    route = jax.jit(lambda z, where: routing.route(z, where, state, config)[0])
    for keys in (None, jax.random.split(jax.random.key(0), _GROUPS)) if scheme.rng else (None,):
        assignment = route(logits, context.replace(rng=keys))
        if isinstance(assignment, Merge) and (pieces > 1 or abs(jnp.sum(assignment.weights[0]) - 1) > 1e-5):
            raise ValueError(
                f"scheme={config.scheme!r} takes a mean of experts: these must be whole copies of the block "
                f"(expert_dim is a {pieces}th of its hidden units), and weigh one together (gates.scale=1)"
            )
        if not isinstance(assignment, TokenChoice | ExpertChoice | Merge):
            raise ValueError(f"scheme={config.scheme!r} mixes tokens, which no dense block does")
        weights = weights_of(assignment, context.valid, config.num_experts)
        found.append(np.asarray(weights.reshape(*weights.shape[:2], -1, pieces).sum(axis=2)))
    return np.stack(found).astype(np.float64)


def _context(config: MoEConfig, width: int, random: np.random.Generator) -> Any:
    """Groups of text and pictures, all of them there."""
    scheme, shape = routing.scheme_of(config), (_GROUPS, _LENGTH)
    index = np.broadcast_to(np.arange(_LENGTH, dtype=np.int32), shape)
    own = scheme.params(width, config).items()
    return RoutingContext(
        valid=jnp.ones(shape, bool),
        modality=jnp.asarray(index % 2),
        tokens=jnp.asarray(random.integers(0, 1000, shape).astype(np.int32)),
        positions=jnp.asarray(index),
        x=jnp.asarray(random.standard_normal((*shape, width), np.float32)),
        previous=jnp.zeros((*shape, scheme.columns(config))) if scheme.previous else None,
        params={name: p.begin(jax.random.key(0), p.shape, jnp.float32) for name, p in own},
        layer=jnp.int32(0),
    )
