"""Runs published encoders of clips on recorded inputs, for every value recorded of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity_vision import gradients, load, seen

from vl_jax.interop.encoders import video

BLOCK = {
    "": "__call__",
    ".layernorm_before": "norm1/__call__",
    ".layernorm_after": "norm2/__call__",
    ".attention": "attention/__call__",
}


def run(fixture: Any) -> dict[str, Any]:
    """Every recorded value of a model in pre-training."""
    config = video.read_videomae(fixture.config)
    module, hidden = config.build("float32"), jnp.asarray(fixture.arrays["in_bool_masked_pos"])
    clips = jnp.moveaxis(jnp.asarray(fixture.arrays["in_pixel_values"]), 2, -1)
    count = int(np.sum(fixture.arrays["in_bool_masked_pos"][0]))
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), clips, hidden, count=count)["params"])
    plan, params = load(video.masked_clips_rules(), shapes, fixture.weights)

    def objective(params: Any) -> tuple[jax.Array, tuple]:
        found, captured = module.apply(
            {"params": params},
            clips,
            hidden,
            count=count,
            mutable=["intermediates"],
            capture_intermediates=lambda _, method: method in ("__call__", "encode"),
        )
        return found.loss, (found, captured["intermediates"])

    (output, captured), found = gradients(objective, params, plan)
    (encoded,) = captured["encoder"].pop("encode")
    shown = seen(captured)
    layers = shown["encoder/blocks/__call__"]
    modules = {
        "mid/videomae.embeddings": shown["encoder/embedded"],
        "mid/videomae.0": encoded.tokens,
        "mid/videomae.layernorm": encoded.tokens,
        "mid/encoder_to_decoder": shown["project/__call__"],
        "mid/decoder.norm": shown["decoder/norm/__call__"],
        "mid/decoder.head": output.pixels,
        "mid/decoder.logits": output.pixels,
    }
    for side, name in (("encoder", "videomae.encoder.layer"), ("decoder", "decoder.decoder_layers")):
        for theirs, ours in BLOCK.items():
            for i, value in enumerate(shown[f"{side}/blocks/{ours}"]):
                modules[f"mid/{name}.{i}{theirs}"] = value
    states = [shown["encoder/embedded"], *layers]
    return {
        **found,
        "out_loss": found["out_objective"],
        "out_logits": output.pixels,
        **{f"out_hidden_states.{i}": state for i, state in enumerate(states)},
        **{f"out_attentions.{i}": w for i, w in enumerate(shown["encoder/blocks/attention/weights"])},
        **modules,
    }
