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
from vl_jax.encoders.language.transformer_xl import Memory, NextWord, TransformerXLConfig, distance_waves
from vl_jax.interop import rules
from vl_jax.interop.encoders import bert, transformer_xl

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


def run_transformer_xl(fixture: Any) -> Found:
    """Every recorded value of Transformer-XL: a segment after zeros, and the one that follows it."""
    arrays, keys = fixture.arrays, list(fixture.weights)
    config = transformer_xl.read_transformer_xl(fixture.config)
    tokens = jnp.asarray(arrays["in_input_ids"])
    start = Memory.empty(config, len(tokens))
    model = Loaded(
        NextWord(config),
        transformer_xl.next_word_rules(config, keys),
        fixture.weights,
        tokens,
        start,
        stacks={},
        ignored=transformer_xl.ignored(config),
    )
    cotangent = np.asarray(arrays["in_cotangent"])
    output, seen, found = model.show(lambda said: jnp.sum(said[0] * cotangent), tokens, start)
    scores, encoded, memory = output
    found |= {
        # Thousands of terms of either sign: in float32 their sum would lose more than the recording allows.
        "out_objective": np.sum(np.asarray(scores, np.float64) * cotangent),
        "out_prediction_scores": scores,
        "out_hidden_states.0": seen["encoder/embedded"],
        f"out_hidden_states.{config.num_layers}": encoded.tokens,
        "mid/transformer.word_emb": _time_first(seen["encoder/embedded"]),
        "mid/transformer.pos_emb": distance_waves(
            config.memory + tokens.shape[1], config.embed_dim, farthest=config.farthest
        )[:, None],
    }
    # What follows from the width of the model was stored beside the weights, and again beside gradients.
    waves = "transformer.pos_emb.inv_freq"
    found |= {f"grad/{waves}": fixture.weights[waves]} if waves in keys else {}
    found |= _blocks(config, seen, memory)
    for i, ids in ((1, tokens), (2, jnp.asarray(arrays["in_decode_segment2_ids"]))):
        said, _, memory = jax.jit(model.module.apply)({"params": model.params}, ids, start)
        losses = _in_order_of_clusters(np.asarray(said), np.asarray(ids), config)
        found |= {f"out_seg{i}_losses": losses, f"out_seg{i}_loss": losses.mean()}
        start = memory
    found["out_seg2_prediction_scores"] = said
    found["out_seg2_mems"] = np.swapaxes(memory.states, 1, 2)
    return found


def _time_first(x: Any) -> Any:
    return np.swapaxes(x, 0, 1)


def _blocks(config: TransformerXLConfig, seen: Mapping[str, Any], memory: Memory) -> Found:
    found: Found = {}
    blocks = {path.removeprefix("encoder/blocks/"): value for path, value in seen.items()}
    for i in range(config.num_layers):
        layer, weights = f"mid/transformer.layers.{i}", blocks["attention/weights"][i]
        state = _time_first(blocks["__call__"][0][i])
        entered = _time_first(blocks["__call__"][1][i])
        mixed = _time_first(blocks["norm1/__call__"][i])
        if not config.norms_follow:
            mixed = entered + _time_first(blocks["attention/__call__"][i])
        found |= {
            f"out_mems.{i}": _time_first(memory.states[i]),
            f"out_hidden_states.{i}": _time_first(entered),
            f"out_attentions.{i}": weights,
            f"{layer}.dec_attn.0": mixed,
            f"{layer}.dec_attn.1": weights.transpose(2, 3, 0, 1),
            f"{layer}.pos_ff": state,
            f"{layer}.0": state,
            f"{layer}.1": weights.transpose(2, 3, 0, 1),
        }
    return found


def _in_order_of_clusters(scores: np.ndarray, tokens: np.ndarray, config: TransformerXLConfig) -> np.ndarray:
    """The loss of every token but the first, as the class gives them: those of the first cluster first."""
    targets = tokens[:, 1:]
    losses = -np.take_along_axis(scores[:, :-1], targets[..., None], axis=-1)[..., 0]
    clusters = np.searchsorted(config.words.cutoffs, targets, side="right")
    return losses.ravel()[np.argsort(clusters.ravel(), kind="stable")].reshape(losses.shape)
