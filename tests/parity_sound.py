"""Runs published speech encoders on recorded inputs, for every value that was recorded of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from parity_words import Found, Loaded

from vl_jax.batch import Given
from vl_jax.fusion.streams import Stream
from vl_jax.heads.transcript import SymbolScores
from vl_jax.interop.encoders import sound


class Recogniser(nn.Module):
    """A tower and its head under the names of the joint model."""

    config: Any  # of the joint model

    def setup(self):
        (tower,), (head,) = self.config.towers, self.config.heads
        # Recorded inputs are what a processor made of sounds, which normalises them or does not.
        self.sound = dataclasses.replace(tower.encoder, normalize=False).build("float32")
        self.transcript = head.build()

    def __call__(self, waves: Any, valid: Any = None) -> tuple[Any, SymbolScores]:
        encoded = self.sound(waves, valid)
        return encoded, self.transcript({"sound": Stream(encoded.tokens, encoded.mask)})


def run(fixture: Any) -> Found:
    """Every recorded value of wav2vec 2.0 with its head."""
    arrays, config = fixture.arrays, sound.read_speech(fixture.config)
    waves = jnp.asarray(arrays["in_input_values"])
    valid = jnp.asarray(arrays["in_attention_mask"]) > 0 if "in_attention_mask" in arrays else None
    encoder, head = config.towers[0].encoder, config.heads[0]
    stacks = {"blocks": range(encoder.num_layers)}
    model = Loaded(
        Recogniser(config),
        sound.speech_rules(list(fixture.weights)),
        fixture.weights,
        waves,
        stacks=stacks,
        ignored=sound.IGNORED,
    )
    labels = np.where(arrays["in_labels"] < 0, -1, arrays["in_labels"]).astype(np.int32)
    label = Given(jnp.asarray(labels), jnp.ones(len(labels), bool))

    def loss(output: Any) -> jax.Array:
        total, _ = head.sums(output[1], label)
        return total / len(labels) if head.by_symbol else total

    (encoded, said), seen, found = model.show(loss, waves, valid)
    features = [
        np.moveaxis(seen[f"sound/features/conv{i}/__call__"], -1, 1)
        for i in range(len(encoder.features.dims))
    ]
    path = "mid/wav2vec2.feature_extractor"
    found |= {f"{path}.conv_layers.{i}": value for i, value in enumerate(features)}
    found |= {
        "out_loss": found["out_objective"],
        "out_logits": said.scores,
        path: features[-1],
        # The class sets what is no frame to 0 in the very array that was recorded.
        "mid/wav2vec2.feature_projection.0": np.where(
            np.asarray(encoded.mask)[..., None], seen["sound/project/__call__"], 0
        ),
        "mid/wav2vec2.feature_projection.1": seen["sound/features_norm/__call__"],
        "mid/wav2vec2.encoder.pos_conv_embed": seen["sound/positions/__call__"],
        "mid/wav2vec2.encoder.layer_norm": seen["sound/norm/__call__"],
        "mid/wav2vec2.encoder.last_hidden_state": encoded.tokens,
        "out_hidden_states.0": seen["sound/embedded"],
    }
    blocks = {name.removeprefix("sound/blocks/"): value for name, value in seen.items()}
    for i in range(encoder.num_layers):
        layer, weights = f"mid/wav2vec2.encoder.layers.{i}", blocks["attention/weights"][i]
        state = blocks["norm2/__call__" if encoder.norms_follow else "__call__"]
        state = state[0][i] if isinstance(state, tuple) else state[i]
        found |= {
            f"out_hidden_states.{i + 1}": state,
            f"out_attentions.{i}": weights,
            f"{layer}.attention.0": blocks["attention/__call__"][i],
            f"{layer}.attention.1": weights,
            layer: state,
        }
    return found
