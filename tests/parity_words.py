"""Runs published text encoders on recorded inputs, for every value that was recorded of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vl_jax import params as params_lib
from vl_jax.encoders.language.bert import BertPretraining
from vl_jax.interop import rules
from vl_jax.interop.encoders import bert

Found = dict[str, Any]


class Loaded:
    """A module with the weights of a fixture."""

    def __init__(
        self,
        module: nn.Module,
        table: Sequence[rules.Rule],
        weights: Mapping[str, np.ndarray],
        *inputs: Any,
        stacks: Mapping[str, Sequence[int]],
        ignored: Sequence[str] = (),
    ):
        self.module, self.weights = module, weights
        shapes = nn.meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs)["params"]))
        flat = {path: tuple(leaf.shape) for path, leaf in params_lib.flatten(shapes).items()}
        self.plan = rules.plan(table, flat, stacks)
        self.params = rules.read(self.plan, weights, shapes, ignored=ignored)

    def show(self, objective: Callable[[Any], Any], *inputs: Any) -> tuple[Any, dict[str, Any], Found]:
        """The output; what was seen on the way, by path; the objective and its gradient. One program."""

        def value(params: Any) -> tuple[jax.Array, Any]:
            output, captured = self.module.apply(
                {"params": params}, *inputs, mutable=["intermediates"], capture_intermediates=True
            )
            return objective(output), (output, captured["intermediates"])

        run = jax.jit(jax.value_and_grad(value, has_aux=True))
        (total, (output, captured)), gradient = jax.device_get(run(self.params))
        flat = {path: leaf[0] for path, leaf in params_lib.flatten(captured).items()}
        # A tensor that no parameter is read from has no gradient.
        found = {f"grad/{key}": np.zeros_like(self.weights[key]) for key in self.weights}
        found |= {f"grad/{key}": array for key, array in rules.export(self.plan, gradient)}
        return output, flat, {**found, "out_objective": total}


def mean_cross_entropy(scores: jax.Array, labels: jax.Array) -> jax.Array:
    """Over the labels that are not -100."""
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.maximum(labels, 0))
    return jnp.mean(losses, where=labels != -100)


def run_bert(fixture: Any) -> Found:
    """Every recorded value of BERT with its pretraining heads."""
    arrays, keys = fixture.arrays, list(fixture.weights)
    config = bert.read_bert(fixture.config)
    tokens = jnp.asarray(arrays["in_input_ids"])
    valid = jnp.asarray(arrays["in_attention_mask"]) > 0 if "in_attention_mask" in arrays else None
    types = jnp.asarray(arrays["in_token_type_ids"]) if "in_token_type_ids" in arrays else None
    model = Loaded(
        BertPretraining(config, bert.is_tied(fixture.config)),
        bert.pretraining_rules(keys),
        fixture.weights,
        tokens,
        stacks=bert.bert_stacks(config),
        ignored=bert.pretraining_ignored(fixture.config, keys),
    )
    inputs = (tokens, valid, types)

    def loss(said: Any) -> jax.Array:
        words = mean_cross_entropy(said.words, jnp.asarray(arrays["in_labels"]))
        return words + mean_cross_entropy(said.follows, jnp.asarray(arrays["in_next_sentence_label"]))

    said, seen, found = model.show(loss, *inputs)
    found |= {
        "out_loss": found["out_objective"],
        "out_prediction_logits": said.words,
        "out_seq_relationship_logits": said.follows,
        "mid/bert.embeddings": seen["encoder/embedded_norm/__call__"],
        "mid/bert.pooler": said.encoded.pooled,
        "mid/cls.predictions.transform": seen["norm/__call__"],
        "mid/cls.predictions": said.words,
        "mid/cls.0": said.words,
        "mid/cls.1": said.follows,
        "out_hidden_states.0": seen["encoder/embedded_norm/__call__"],
    }
    blocks = {path.removeprefix("encoder/blocks/"): value for path, value in seen.items()}
    for i in range(config.num_layers):
        layer = f"mid/bert.encoder.layer.{i}"
        mixed, weights = blocks["attention/mixed"][i], blocks["attention/weights"][i]
        found |= {
            f"out_hidden_states.{i + 1}": blocks["norm2/__call__"][i],
            f"out_attentions.{i}": weights,
            f"{layer}.attention.self.0": mixed.reshape(*mixed.shape[:2], -1),
            f"{layer}.attention.self.1": weights,
            f"{layer}.attention.0": blocks["norm1/__call__"][i],
            f"{layer}.attention.1": weights,
            layer: blocks["norm2/__call__"][i],
        }
    return found
