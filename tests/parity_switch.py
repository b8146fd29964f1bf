"""Runs published Switch Transformers on recorded inputs and gives every value that was recorded of them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vl_jax import losses
from vl_jax import params as params_lib
from vl_jax.interop import rules
from vl_jax.interop.encoder_decoder import (
    IGNORED,
    SwitchConfig,
    encoder_decoder_rules,
    encoder_decoder_stacks,
    read_encoder_decoder,
)
from vl_jax.language.encoder_decoder import EncoderDecoder, StackConfig, router_logits, shift_right
from vl_jax.moe import balance, dispatch
from vl_jax.moe.routing import MoEConfig


class Switch:
    """A model with the weights of a fixture, and its inputs."""

    def __init__(self, fixture: Any):
        arrays = fixture.arrays
        self.config: SwitchConfig = read_encoder_decoder(fixture.config)
        self.model = EncoderDecoder(self.config.model, self.config.moe)
        self.labels = jnp.asarray(arrays["in_labels"])
        shifted = shift_right(self.labels, start_id=self.config.start_id, pad_id=self.config.pad_id)
        self.target = jnp.asarray(arrays.get("in_decoder_input_ids", shifted))
        self.source = jnp.asarray(arrays["in_input_ids"])
        self.masks = {
            "source_valid": jnp.asarray(arrays.get("in_attention_mask", np.ones(self.source.shape))) > 0,
            "target_valid": jnp.asarray(arrays.get("in_decoder_attention_mask", np.ones(self.target.shape)))
            > 0,
        }
        self.penalized = fixture.meta["call_kwargs"].get("output_router_logits") or False
        shapes = jax.eval_shape(
            lambda: self.model.init(jax.random.key(0), self.source, self.target)["params"]
        )
        shapes = nn.meta.unbox(shapes)
        flat = {path: tuple(leaf.shape) for path, leaf in params_lib.flatten(shapes).items()}
        self.plan = rules.plan(encoder_decoder_rules(), flat, encoder_decoder_stacks(self.config.model))
        self.params = rules.read(self.plan, fixture.weights, shapes, ignored=IGNORED)

    def stacks(self) -> dict[str, StackConfig]:
        return {"encoder": self.config.model.encoder, "decoder": self.config.model.decoder}

    def loss(self, params: Any) -> tuple[jax.Array, tuple[Any, Any, Any]]:
        """The loss of the published class, and what it is made of."""
        output, captured = self.model.apply(
            {"params": params},
            self.source,
            self.target,
            **self.masks,
            mutable=["intermediates"],
            capture_intermediates=True,
        )
        captured = captured["intermediates"]
        routers = {side: self.router_losses(side, captured[side]) for side in self.stacks()}
        counted = self.labels >= 0
        scores, _ = losses.cross_entropy(output.logits, jnp.maximum(self.labels, 0))
        loss = jnp.mean(scores, where=counted)
        if self.penalized:
            for values in routers.values():
                loss = (
                    loss + self.config.z_weight * values["z"] + self.config.balance_weight * values["balance"]
                )
        return loss, (output, captured, routers)

    def router_losses(self, side: str, captured: Any) -> dict[str, jax.Array]:
        """Padding counts; a stack that is not penalized has none."""
        if side not in self.config.penalized:
            return {"balance": jnp.zeros(()), "z": jnp.zeros(())}
        logits = router_logits(captured, self.stacks()[side])
        return balance.sequence_losses(logits, jnp.ones(logits.shape[1:-1], bool))


def run(fixture: Any) -> dict[str, Any]:
    """Every recorded value of a Switch Transformer."""
    switch = Switch(fixture)
    step = jax.jit(jax.value_and_grad(switch.loss, has_aux=True))
    (loss, parts), gradient = jax.device_get(step(switch.params))
    output, captured, routers = parts
    found = {"out_loss": loss, "out_objective": loss, "out_logits": output.logits}
    found["out_encoder_last_hidden_state"] = output.encoded
    hidden = {"encoder": output.encoded, "decoder": output.hidden}
    tokens, tied = {"encoder": switch.source, "decoder": switch.target}, switch.config.model.tie_embeddings
    tables = dict.fromkeys(tokens, "embedding") if tied else TABLES
    for side, layers in switch.stacks().items():
        found |= {f"out_{side}_z_loss": routers[side]["z"], f"out_{side}_aux_loss": routers[side]["balance"]}
        embedded = np.asarray(switch.params[tables[side]])[np.asarray(tokens[side])]
        seen = Seen(side, layers, switch.config.moe, captured[side], embedded, hidden[side])
        found |= dict(seen.outputs()) | {f"mid/{side}.{name}": value for name, value in seen.modules()}
    # A tensor that no parameter is read from (``IGNORED``) has no gradient.
    found |= {f"grad/{key}": np.zeros_like(fixture.weights[key]) for key in fixture.weights}
    return found | {f"grad/{key}": array for key, array in rules.export(switch.plan, gradient)}


TABLES = {"encoder": "source_embedding", "decoder": "target_embedding"}


class Seen:
    """What one stack showed on the way, under the names it was recorded by."""

    def __init__(
        self,
        side: str,
        layers: StackConfig,
        moe: MoEConfig,
        captured: Mapping[str, Any],
        first: Any,
        last: Any,
    ):
        self.side, self.layers, self.moe, self.last = side, layers, moe, last
        self.bias = captured["bias"][0]
        self.blocks: list[dict[str, Any]] = []  # of each layer what it showed, by path
        for run in layers.runs:
            flat = {path: leaf[0] for path, leaf in params_lib.flatten(captured[run.name]).items()}
            flat = {path: leaf[0] if type(leaf) is tuple else leaf for path, leaf in flat.items()}
            for i in range(len(run.layers)):
                self.blocks.append({path: jax.tree.map(lambda a, i=i: a[i], v) for path, v in flat.items()})
        self.states = [first, *(block["__call__"] for block in self.blocks)]

    def outputs(self) -> Iterator[tuple[str, Any]]:
        for i, state in enumerate([*self.states[:-1], self.last]):
            yield f"out_{self.side}_hidden_states.{i}", state
        for i, layer in enumerate(self.layers.sparse_layers):
            yield f"out_{self.side}_router_logits.{i}", self.blocks[layer]["moe/logits"]
        for i, block in enumerate(self.blocks):
            yield f"out_{self.side}_attentions.{i}", block["attention/weights"]
            if "cross_attention/weights" in block:
                yield f"out_cross_attentions.{i}", block["cross_attention/weights"]

    def modules(self) -> Iterator[tuple[str, Any]]:
        yield "final_layer_norm", self.last
        for i, (block, before) in enumerate(zip(self.blocks, self.states, strict=False)):
            parts = [("attention", self.bias)]
            if "cross_attention/weights" in block:
                weights = block["cross_attention/weights"]
                parts.append(("cross_attention", np.zeros_like(weights[:1])))
            for number, (part, bias) in enumerate(parts):
                before = before + block[f"{part}/__call__"]
                name = f"block.{i}.layer.{number}"
                yield from {
                    f"{name}.0": before,
                    f"{name}.1": bias,
                    f"{name}.2": block[f"{part}/weights"],
                }.items()
            name = f"block.{i}.layer.{len(parts)}"
            yield name, block["__call__"]
            yield f"{name}.mlp", block["moe/__call__" if "moe/logits" in block else "mlp/__call__"]
            if "moe/logits" in block:
                yield from self._router(f"{name}.mlp.router", block)

    def _router(self, name: str, block: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """(who goes where, the rest dropped; the best probability, of the dropped too; logits)."""
        assignment, logits = block["moe/assignment"], block["moe/logits"]
        kept = _kept(assignment, np.ones(logits.shape[:-1], bool), self.moe)
        yield f"{name}.0", np.asarray(kept)[..., :1] == np.arange(self.moe.num_experts)
        yield f"{name}.1", assignment.gates
        yield f"{name}.2", logits


@functools.partial(jax.jit, static_argnums=2)
def _kept(assignment: Any, valid: jax.Array, config: MoEConfig) -> jax.Array:
    return dispatch.apply_capacity(assignment, valid, config)[0].experts
