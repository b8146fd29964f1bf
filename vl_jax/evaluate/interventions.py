"""What a trained model's routing does, and what the loss would be had it done otherwise.

    batches --as it is-------------------> loss, load [L M E], entropies, co-activation [L E E]
            --expert (l, e) taken away---> loss [L E]: knock-out; its tokens go to their next best expert,
                                           or its share of them to the others
            --first choice taken away----> loss [L], and of every target: forced route

An intervention is an entry of the routing state (``routing.EXCLUDED``), so one compiled program serves all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vl_jax import losses, sharding
from vl_jax.batch import MODALITIES, Batch
from vl_jax.layout import NO_COLLECTIONS, Layout, put_batch
from vl_jax.moe import losses as router_losses
from vl_jax.moe import routing
from vl_jax.moe.assignment import ExpertChoice, Merge, TokenChoice, weights_of
from vl_jax.moe.stacks import RoutingState, Stack, sown


@dataclasses.dataclass(frozen=True)
class Study:
    """Figures of a model's routing over some batches; losses are means per target, in nats."""

    layers: tuple[int, ...]  # the numbers of the sparse layers, L of them
    loss: float
    targets: int  # how many were predicted
    load: np.ndarray  # i64[L M E] choices by modality
    choices: np.ndarray  # f64[L E E] tokens that have both; of shares, the sum of their products
    router_entropy: np.ndarray  # f64[L M] of the scheme's own scores, mean over tokens, nats
    knockout: np.ndarray  # f64[L E] loss without the expert
    # f64[L S] shards a token is sent to, for each of ``balance.fan_out_shards``; S is 0 where tokens do not
    # choose
    fan_out: np.ndarray
    rerouted: np.ndarray  # f64[L] loss with every token's first choice taken away
    changes: tuple[Change, ...]  # the targets that suffer most from that

    @property
    def marginal_entropy(self) -> np.ndarray:
        """Entropy of the experts' load by modality, f64[L M] nats."""
        return _entropy(self.load / np.maximum(self.load.sum(axis=-1, keepdims=True), 1))

    @property
    def modality_information(self) -> np.ndarray:
        """How much an expert tells of the modality, and the reverse: mutual information, f64[L] nats."""
        joint = self.load / np.maximum(self.load.sum(axis=(1, 2), keepdims=True), 1)
        both = _entropy(joint.sum(axis=1)) + _entropy(joint.sum(axis=2))
        return both - _entropy(joint.reshape(len(joint), -1))


@dataclasses.dataclass(frozen=True)
class Change:
    """A target that was predicted worse because its token was sent elsewhere in one layer."""

    layer: int
    expert: int  # the first choice that was taken away
    batch: int
    row: int
    position: int  # of the token that predicts
    target: int  # the id that follows it
    loss: float
    rerouted_loss: float


def _entropy(p: np.ndarray) -> np.ndarray:
    return -np.sum(p * np.log(np.maximum(p, 1e-30)), axis=-1)


def study(
    layout: Layout,
    params: Any,
    state: RoutingState,
    batches: Sequence[Batch],
    *,
    stack: str,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    num_changes: int = 20,
    collections: Mapping[str, Any] = NO_COLLECTIONS,
) -> Study:
    """Runs every intervention on every batch.

    Args:
      batches: host batches, kept in memory.
      stack: name of the stack whose routing is studied.
      track: wraps the interventions, to show progress; they are L * (E + 1).

    Raises:
      ValueError: there is nothing to predict.
    """
    model, of = layout.model, layout.model.config.stacks[stack]
    num_layers, num_experts = len(of.layers), of.moe.num_experts
    on_device = [put_batch(batch, layout) for batch in batches]
    with sharding.use_mesh(layout.mesh, layout.rules):
        plain = jax.jit(functools.partial(_observe, model=model, stack=stack))
        seen = [jax.device_get(plain(params, state, batch, collections=collections)) for batch in on_device]
        weights = [np.asarray(batch.loss_weights) for batch in batches]
        total = sum(float(w.sum()) for w in weights)
        if not total:
            raise ValueError("the batches have nothing to predict")
        without = jax.jit(functools.partial(target_losses, model=model))

        def losses_of(excluded_in: Callable[[int], Any]) -> list[np.ndarray]:
            changed = [
                {**state, stack: {**state[stack], routing.EXCLUDED: excluded_in(i)}}
                for i in range(len(on_device))
            ]
            found = (
                without(params, s, b, collections=collections)
                for s, b in zip(changed, on_device, strict=True)
            )
            return [np.asarray(x) for x in found]

        def mean(values: Sequence[np.ndarray]) -> float:
            return sum(float(np.sum(v * w)) for v, w in zip(values, weights, strict=True)) / total

        merges = seen[0]["merges"]
        knockout, rerouted = np.zeros((num_layers, num_experts)), np.zeros(num_layers)
        changes: list[Change] = []
        plan = [(layer, expert) for layer in range(num_layers) for expert in (*range(num_experts), None)]
        for layer, expert in track(plan):
            if expert is not None:
                mask = np.zeros((num_layers, 1, 1, num_experts), bool)
                mask[layer, ..., expert] = True
                knockout[layer, expert] = mean(losses_of(lambda _, m=mask: m))
                continue
            first = [s["first"][layer] for s in seen]
            if merges:  # all tokens of a group have the same
                first = [f.min(axis=1, keepdims=True) for f in first]
            found = losses_of(lambda i, n=layer, f=first: _only(n, num_layers, f[i], num_experts))
            rerouted[layer] = mean(found)
            for number, values in enumerate(found):
                if seen[number]["first"][layer].shape != batches[number].tokens.shape:
                    break  # the stack's tokens are not those that predict
                changes += _changes(number, layer, batches[number], seen[number], values)
    changes.sort(key=lambda c: c.loss - c.rerouted_loss)
    return Study(
        layers=of.layers,
        loss=mean([s["nll"] for s in seen]),
        targets=sum(int(np.count_nonzero(w)) for w in weights),
        load=np.asarray(sum(s["load"].astype(np.int64) for s in seen)),
        choices=np.asarray(sum(s["choices"].astype(np.float64) for s in seen)),
        router_entropy=_mean_entropy(seen),
        fan_out=_fan_out(seen),
        knockout=knockout,
        rerouted=rerouted,
        changes=tuple(changes[:num_changes]),
    )


def target_losses(
    params: Any,
    state: RoutingState,
    batch: Batch,
    *,
    model: Any,
    collections: Mapping[str, Any] = NO_COLLECTIONS,
) -> Float[Array, "B Q"]:
    """The loss of every target, in nats."""
    variables = {"params": params, **collections}
    output: Any = model.apply(variables, batch, state)
    return _nll(variables, batch, output, model)


def _nll(variables: Any, batch: Batch, output: Any, model: Any) -> jax.Array:
    predicting = jnp.take_along_axis(output.hidden, batch.target_index[..., None], axis=1)
    logits: Any = model.apply(variables, predicting, method="logits")
    return losses.cross_entropy(logits, batch.targets)[0]


def _observe(
    params: Any,
    state: RoutingState,
    batch: Batch,
    *,
    model: Any,
    stack: str,
    collections: Mapping[str, Any] = NO_COLLECTIONS,
) -> dict[str, Any]:
    """Losses and statistics without an intervention."""
    variables = {"params": params, **collections}
    output, kept = model.apply(variables, batch, state, mutable=["intermediates"])
    of: Stack = model.config.stacks[stack]
    num_experts = of.moe.num_experts
    first, together, entropies, merges = [], [], [], False
    for layer in sown(kept["intermediates"], of):
        merges = isinstance(layer.assignment, Merge)
        share = weights_of(layer.assignment, layer.valid, num_experts)
        first.append(jnp.where(jnp.any(share > 0, axis=-1), jnp.argmax(share, axis=-1), num_experts))
        chosen = _chosen(layer.assignment, share)
        together.append(jnp.einsum("BTE,BTF->EF", chosen, chosen))
        # Some schemes' scores leave room for experts that do nothing.
        share = layer.scores / jnp.maximum(jnp.sum(layer.scores, axis=-1, keepdims=True), 1e-30)
        entropy = router_losses.entropy(share)
        modalities = [layer.valid & (layer.modality == m) for m in range(len(MODALITIES))]
        entropies.append(jnp.stack([jnp.sum(jnp.where(m, entropy, 0.0)) for m in modalities]))
    stats = output.routed[stack].stats
    return {
        "nll": _nll(variables, batch, output, model),
        "load": stats.load,
        "tokens": stats.tokens,
        "first": jnp.stack(first),
        "merges": merges,
        "choices": jnp.stack(together),
        "destinations": stats.destinations,
        "entropy": jnp.stack(entropies),
    }


def _chosen(assignment: Any, weights: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    """1 where a token has an expert; where it has something of all of them, how much."""
    if isinstance(assignment, TokenChoice):
        return jax.nn.one_hot(assignment.experts, weights.shape[-1]).sum(axis=-2)
    return (weights > 0).astype(jnp.float32) if isinstance(assignment, ExpertChoice) else weights


def _only(layer: int, num_layers: int, first: np.ndarray, num_experts: int) -> np.ndarray:
    """A mask [L B T E] of the first choices of one layer."""
    mask = np.zeros((num_layers, *first.shape, num_experts), bool)
    mask[layer] = first[..., None] == np.arange(num_experts)
    return mask


def _fan_out(seen: Sequence[Any]) -> np.ndarray:
    """The mean number of shards of a token, [L S]; [L 0] where tokens are not sent."""
    tokens = np.maximum(np.sum([s["tokens"] for s in seen], axis=(0, 2)), 1)[:, None]
    if seen[0]["destinations"] is None:
        return np.zeros((len(tokens), 0))
    return np.sum([s["destinations"] for s in seen], axis=0, dtype=np.float64) / tokens


def _mean_entropy(seen: Sequence[Any]) -> np.ndarray:
    tokens = np.sum([s["tokens"] for s in seen], axis=0)
    return np.sum([s["entropy"] for s in seen], axis=0, dtype=np.float64) / np.maximum(tokens, 1)


def _changes(number: int, layer: int, batch: Batch, seen: Any, values: np.ndarray) -> list[Change]:
    """One entry for every target that got worse."""
    result = []
    for row, column in zip(*np.nonzero(np.asarray(batch.loss_weights)), strict=True):
        before, after = float(seen["nll"][row, column]), float(values[row, column])
        if after > before:
            position = int(batch.target_index[row, column])
            expert, target = int(seen["first"][layer][row, position]), int(batch.targets[row, column])
            change = Change(layer, expert, number, int(row), position, target, before, after)
            result.append(change)
    return result
