"""Runs published Swin transformers on recorded inputs, for every value recorded of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from parity_conv import Found, Loaded, channels_first, channels_last

from vl_jax.encoders.shifted import stacks_of
from vl_jax.encoders.swin import SwinConfig
from vl_jax.interop.encoders import swin

# What a recorded block shows, and where ours shows the same.
BLOCK = {
    "0": "",
    "1": "/attention/weights",
    "attention.0": "/attention",
    "attention.1": "/attention/weights",
}


def run(fixture: Any) -> Found:
    """Every recorded value of an encoder."""
    config, names = swin.read_swin(fixture.config), swin.names_of(fixture.config)
    model = Loaded(
        config.build("float32"),
        names.rules(config, target="params/"),
        fixture.weights,
        channels_last(fixture.arrays["in_pixel_values"]),
        stacks={f"{name}": layers for name, layers in names.stacks(config).items()},
        ignored=swin.IGNORED,
        method="__call__",
    )
    pooled = fixture.meta["main_output"] == "out_pooler_output"
    output, captured, found = model.show(
        lambda out: out.pooled if pooled else out.tokens, fixture.arrays["in_cotangent"]
    )
    found |= {"out_last_hidden_state": output.tokens, "out_pooler_output": output.pooled}
    embedded = captured["embedded"][0]
    rows, columns = embedded.shape[1:3]
    found |= {
        "mid/embeddings.0": cells(embedded),
        "mid/embeddings.1.0": np.float32(rows),
        "mid/embeddings.1.1": np.float32(columns),
        "mid/layernorm": output.tokens,
        **{f"out_hidden_states.{i}": cells(x) for i, x in enumerate(states(config, captured))},
        **{
            f"out_reshaped_hidden_states.{i}": channels_first(x)
            for i, x in enumerate(states(config, captured))
        },
    }
    for stage, blocks in enumerate(config.stage_blocks):
        name = f"mid/encoder.layers.{stage}."
        for number in range(blocks):
            found |= {
                f"{name}blocks.{number}.{k}": v for k, v in block(captured, stage, number, blocks).items()
            }
        after = states(config, captured)[stage + 1]
        weights = found[f"{name}blocks.{blocks - 1}.1"]
        found |= {f"{name}0": cells(after), f"{name}1": channels_first(after), f"{name}2": weights}
        found |= {f"{name}downsample": cells(after), f"out_attentions.{stage}": weights}
    return found


def cells(x: Any) -> Any:
    """A grid as tokens, row by row."""
    return jnp.reshape(x, (x.shape[0], -1, x.shape[-1]))


def states(config: SwinConfig, captured: Mapping[str, Any]) -> list[Any]:
    """What enters the first stage, and what leaves each, merged where another follows."""
    return [
        captured["embedded"][0],
        *(captured[f"stage{i}"][0][0] for i in range(len(config.stage_blocks))),
    ]


def block(captured: Mapping[str, Any], stage: int, number: int, blocks: int) -> Found:
    """What one block showed, by the names of the recorded modules."""
    name, numbers = next((n, held) for n, held in stacks_of(blocks).items() if number in held)
    found: Found = {}
    for theirs, ours in BLOCK.items():
        value = captured[f"stage{stage}/{name}{ours}"][0]
        value = (value[0] if isinstance(value, tuple) else value)[numbers.index(number)]
        if not ours:
            value = cells(value)
        elif theirs == "attention.0":
            value = value.reshape(value.shape[0], -1, value.shape[-1])
        found[theirs] = value
    return found
