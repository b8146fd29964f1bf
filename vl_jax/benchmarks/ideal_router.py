"""How near a routing scheme comes to the best router, on a problem of which that one is known.

    token = centre of its cluster + noise        target = A[cluster] token

Every cluster has a linear map of its own, so the best router gives every cluster its own experts. A layer of
experts learns the maps with the scheme that is examined; the same layer learns them with that router, and
with one that draws experts at random. Between the two lies ``closeness``: 0 is as good as drawing, 1 as good
as the best router.

How much clusters and experts tell of one another is their mutual information over tokens; its share of the
entropy of clusters is ``specialisation``: 0 where clusters share experts alike, 1 where each has its own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from vl_jax.batch import TEXT, VISION
from vl_jax.moe import routing
from vl_jax.moe.assignment import RoutingContext, weights_of
from vl_jax.moe.checks.subject import NO_SHARED
from vl_jax.moe.config import BalanceConfig, ExecutionConfig, GateConfig
from vl_jax.moe.conformance import small_config
from vl_jax.moe.layer import DynamicMoE
from vl_jax.moe.routing import MoEConfig

_RATE = 5e-3  # of Adam


@dataclasses.dataclass(frozen=True)
class Clusters:
    """The problem, and how long it is learned."""

    width: int = 16  # of a token
    noise: float = 0.5  # of tokens around their centre, whose length is that of ``width`` normal numbers
    skew: float = 0.0  # clusters are as frequent as 1 / number**skew
    rows: int = 8  # of a batch; each is a routing group
    length: int = 32  # tokens of a row
    steps: int = 500
    held_out: int = 64  # rows that figures are of
    seeds: int = 3

    def __post_init__(self):
        for name in ("width", "rows", "length", "steps", "held_out", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        if self.noise < 0 or self.skew < 0:
            raise ValueError(f"noise={self.noise}, skew={self.skew}: must be >= 0")


@dataclasses.dataclass(frozen=True)
class RouterScore:
    """What a scheme came to; means over seeds of figures of held-out tokens."""

    scheme: str
    loss: float  # squared error over the variance of the targets
    ideal: float  # the same with the best router
    drawn: float  # with experts drawn at random
    closeness: float  # (drawn - loss) / (drawn - ideal)
    closeness_of_seeds: tuple[float, ...]
    information: float  # mutual information of clusters and experts, nats
    most: float  # entropy of clusters, which bounds it
    specialisation: float  # their ratio

    def __str__(self) -> str:
        low, high = min(self.closeness_of_seeds), max(self.closeness_of_seeds)
        lines = (
            f"loss            {self.loss:.4f}  (best router {self.ideal:.4f}, random {self.drawn:.4f})",
            f"closeness       {self.closeness:.2f}  ({low:.2f} to {high:.2f} over seeds)",
            f"specialisation  {self.specialisation:.2f}  ({self.information:.2f} of {self.most:.2f} nats)",
        )
        return "\n".join(lines)


def examine(
    scheme: str,
    config: MoEConfig | None = None,
    clusters: Clusters = Clusters(),
    *,
    json_file: Path | None = None,
) -> RouterScore:
    """Trains a layer with the scheme, with the best router and with random experts; takes seconds.

    Args:
      scheme: as ``MoEConfig.scheme``: a built-in name, or ``path/to/file.py:name``.
      config: the layer; by default two of eight small experts for a token, or one where the scheme insists.
        There are as many clusters as sets of ``top_k`` experts. Its shared experts are left out, since these
        would do what every cluster needs.
      json_file: where the figures go as well.

    Raises:
      ValueError: the scheme cannot be loaded or configured, or there are experts for one cluster only.
    """
    config = config or _default(scheme)
    plain = ExecutionConfig(kernel="reference")
    config = dataclasses.replace(config, scheme=scheme, shared=NO_SHARED, execution=plain)
    number = config.num_experts // config.top_k
    if number < 2:
        raise ValueError(
            f"num_experts={config.num_experts}, top_k={config.top_k}: the best router needs "
            f"{config.top_k} experts for each of two clusters or more"
        )
    # A layer that is told its experts still learns how much each of them weighs.
    told = MoEConfig(
        *(
            "top_k",
            config.num_experts,
            config.top_k,
            config.expert_dim,
            NO_SHARED,
            GateConfig(normalize=True),
        ),
        expert_bias=config.expert_bias,
        activation=config.activation,
        balance=BalanceConfig(weight=0.0),
        execution=plain,
    )
    ways = (config, ""), (told, "ideal"), (told, "drawn")
    own, ideal, drawn = (_learn(way, clusters, number, routes) for way, routes in ways)
    most = float(-(shares := _frequencies(clusters, number)) @ np.log(shares))
    loss, lowest, highest = (found["loss"].astype(np.float64) for found in (own, ideal, drawn))
    near = (highest - loss) / np.maximum(highest - lowest, 1e-12)
    information = float(own["information"].mean())
    score = RouterScore(
        scheme=scheme,
        loss=float(loss.mean()),
        ideal=float(lowest.mean()),
        drawn=float(highest.mean()),
        closeness=float(near.mean()),
        closeness_of_seeds=tuple(near.tolist()),
        information=information,
        most=most,
        specialisation=information / most,
    )
    if json_file is not None:
        json_file.write_text(json.dumps(dataclasses.asdict(score), indent=2) + "\n", encoding="utf-8")
    return score


def _default(scheme: str) -> MoEConfig:
    """The small layer of the conformance checks, with experts wide enough for a map."""
    small = small_config(scheme)
    gates = GateConfig(normalize=small.top_k > 1)  # of one gate, the sum is the gate
    balance = BalanceConfig(weight=1e-2, scope="batch", bias_rate=1e-2)
    return dataclasses.replace(small, expert_dim=32, gates=gates, balance=balance)


def _frequencies(clusters: Clusters, number: int) -> np.ndarray:
    weights = np.arange(1, number + 1, dtype=np.float64) ** -clusters.skew
    return weights / weights.sum()


def _learn(config: MoEConfig, clusters: Clusters, number: int, routes: str) -> dict[str, np.ndarray]:
    """Figures of every seed; with ``routes``, experts are told instead of chosen."""
    found = []
    for seed in range(clusters.seeds):
        random = np.random.default_rng(seed)
        rows = clusters.steps * clusters.rows
        data = _draw(clusters, number, random, rows + clusters.held_out)
        params = _first_params(config, clusters.width, random)
        if routes:
            data = {**data, "routes": _told(routes, data["cluster"], config, random)}
        batched = {k: v[:rows].reshape(-1, clusters.rows, *v.shape[1:]) for k, v in data.items()}
        held_out = {k: v[rows:] for k, v in data.items()}
        found.append(jax.device_get(_run(config, number, params, batched, held_out)))
    return {name: np.array([figures[name] for figures in found]) for name in found[0]}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(config: MoEConfig, number: int, params: Any, batches: Any, held_out: Any) -> dict[str, jax.Array]:
    """Learns batch after batch, and gives the figures of what is held out."""
    layer, steps = DynamicMoE(config), len(batches["x"])
    optimizer = optax.adam(optax.cosine_decay_schedule(_RATE, steps, 0.05))
    noisy = routing.scheme_of(config).rng

    def objective(params: Any, state: Any, batch: Any, count: jax.Array | None) -> tuple[jax.Array, Any]:
        given = {**state, routing.ROUTES: batch["routes"]} if "routes" in batch else state
        key = None if count is None else jax.random.fold_in(jax.random.key(0), count)
        (y, output), kept = layer.apply(  # pyright: ignore[reportGeneralTypeIssues]
            *({"params": params}, batch["x"], _context(batch), given),
            rngs={"routing": key} if noisy and key is not None else None,
            mutable=["intermediates"],
        )
        error = jnp.mean((y - batch["target"]) ** 2) / jnp.mean(batch["target"] ** 2)
        assignment = kept["intermediates"]["assignment"][0]
        return error + sum(output.losses.values()), (error, output.stats, assignment)

    def step(carry: Any, numbered: Any) -> tuple[Any, None]:
        (params, state, moments), (count, batch) = carry, numbered
        gradient, (_, stats, _) = jax.grad(objective, has_aux=True)(params, state, batch, count)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies counts with decay rates
            updates, moments = optimizer.update(gradient, moments, params)
        return (
            optax.apply_updates(params, updates),
            routing.update_state(state, stats, config),
            moments,
        ), None

    carry = params, routing.init_state(config), optimizer.init(params)
    (params, state, _), _ = jax.lax.scan(step, carry, (jnp.arange(steps), batches))
    _, (error, _, assignment) = objective(params, state, held_out, None)
    weights = weights_of(assignment, _context(held_out).valid, config.num_experts)
    return {"loss": error, "information": information(weights, held_out["cluster"], number)}


def _draw(clusters: Clusters, number: int, random: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """Rows of tokens, with their ids, clusters and targets; an id says nothing of the cluster."""
    width, shape = clusters.width, (rows, clusters.length)
    centres = random.standard_normal((number, width), np.float32)
    maps = random.standard_normal((number, width, width), np.float32) / np.float32(math.sqrt(width))
    cluster = random.choice(number, shape, p=_frequencies(clusters, number)).astype(np.int32)
    noise = np.float32(clusters.noise) * random.standard_normal((*shape, width), np.float32)
    x, target = centres[cluster] + noise, np.zeros((*shape, width), np.float32)
    for one, own in enumerate(maps):
        target[cluster == one] = x[cluster == one] @ own
    ids = random.integers(0, 1000, shape).astype(np.int32)
    return {"x": x, "cluster": cluster, "target": target, "ids": ids}


def _first_params(config: MoEConfig, width: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Normal numbers by the inputs of a matrix, and zeros for biases."""
    context = _context({"cluster": np.zeros((1, 2), np.int32), "ids": np.zeros((1, 2), np.int32)})
    init, state = DynamicMoE(config).init, routing.init_state(config)
    shapes = jax.eval_shape(init, jax.random.key(0), np.zeros((1, 2, width), np.float32), context, state)
    inputs = {"router": 0, "w_in": 1, "w_out": 1}  # axis of each
    return {
        name: random.standard_normal(leaf.shape, np.float32) / np.float32(math.sqrt(leaf.shape[inputs[name]]))
        if name in inputs
        else np.zeros(leaf.shape, np.float32)
        for name, leaf in nn.meta.unbox(shapes["params"]).items()
    }


def _context(batch: Any) -> RoutingContext:
    """Every other cluster is of pictures."""
    cluster = batch["cluster"]
    places = jnp.broadcast_to(jnp.arange(cluster.shape[1], dtype=jnp.int32), cluster.shape)
    modality = jnp.where(cluster % 2, VISION, TEXT).astype(jnp.int32)
    return RoutingContext(jnp.ones(cluster.shape, bool), modality, tokens=batch["ids"], positions=places)


def _told(how: str, cluster: np.ndarray, config: MoEConfig, random: np.random.Generator) -> np.ndarray:
    """The experts of the best router, those of the token's cluster alone; or as many that are drawn."""
    top_k = config.top_k
    if how == "ideal":
        return cluster[..., None] * top_k + np.arange(top_k, dtype=np.int32)
    scores = random.random((*cluster.shape, config.num_experts), np.float32)
    return np.argsort(scores, axis=-1)[..., :top_k].astype(np.int32)


def information(weights: Float[Array, "G T E"], cluster: Int[Array, "G T"], number: int) -> Float[Array, ""]:
    """Mutual information of clusters and experts in nats; every token counts once.

    Tokens that have no expert are left out.
    """
    total = jnp.sum(weights, axis=-1, keepdims=True)
    shares = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 0.0)
    joint = jnp.einsum("GTC,GTE->CE", jax.nn.one_hot(cluster, number), shares)
    joint = joint / jnp.maximum(jnp.sum(joint), 1e-20)
    apart = jnp.sum(joint, axis=1, keepdims=True) * jnp.sum(joint, axis=0)
    positive = joint > 0
    ratio = jnp.where(positive, joint, 1.0) / jnp.where(positive, apart, 1.0)
    return jnp.sum(joint * jnp.log(ratio))
