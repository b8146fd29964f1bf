"""Runs published image encoders and image-text pairs on recorded inputs, for every value recorded of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vl_jax import params as params_lib
from vl_jax.batch import Batch
from vl_jax.encoders.transformer import Encoded
from vl_jax.encoders.vit import ViT
from vl_jax.fusion.streams import Stream
from vl_jax.heads.pairs import PairVectors
from vl_jax.interop import rules, vision
from vl_jax.interop.rules import Rule
from vl_jax.joint import JointConfig
from vl_jax.train.objectives.contrastive_losses import sigmoid_sums, softmax_sums

# Module of a recorded encoder, and where ours shows the same value.
_BLOCK = {
    "": "__call__",
    ".layer_norm1": "norm1/__call__",
    ".layer_norm2": "norm2/__call__",
    ".self_attn.0": "attention/__call__",
    ".self_attn.1": "attention/weights",
    ".mlp": "fc2/__call__",
    ".mlp.fc1": "fc1/__call__",
    ".mlp.fc2": "fc2/__call__",
}
_LAYERS = {"encoder.layers.{layer}" + name: f"blocks/{path}" for name, path in _BLOCK.items()}
_CLIP_AND_SIGLIP = {
    **_LAYERS,
    "embeddings": "embedded",
    "pre_layrnorm": "pre_norm/__call__",
    "encoder": "encoded",
    "post_layernorm": "norm/__call__",
    "head": "pooler/__call__",
    "head.attention.0": "pooler/attention/__call__",
    "head.attention.1": "probe_weights",
    "head.layernorm": "pooler/norm/__call__",
    "head.mlp.fc1": "pooler/fc1/__call__",
    "head.mlp": "pooler/fc2/__call__",
}
MODULES: dict[str, Mapping[str, str]] = {
    "siglip_vision_model": _CLIP_AND_SIGLIP,
    "clip_vision_model": _CLIP_AND_SIGLIP,
    "vit": {
        "embeddings": "embedded",
        "embeddings.patch_embeddings": "stem/__call__",
        "layers.{layer}": "blocks/__call__",
        "layers.{layer}.layernorm_before": "blocks/norm1/__call__",
        "layers.{layer}.layernorm_after": "blocks/norm2/__call__",
        "layers.{layer}.attention.0": "blocks/attention/__call__",
        "layers.{layer}.attention.1": "blocks/attention/weights",
        "layers.{layer}.mlp": "blocks/fc2/__call__",
        "layers.{layer}.mlp.fc1": "blocks/fc1/__call__",
        "layernorm": "norm/__call__",
        "pooler": "pooled",
    },
    "text": {
        **_LAYERS,
        "embeddings": "embedded",
        "final_layer_norm": "norm/__call__",
        "head": "projection/__call__",
    },
}


def seen(captured: Any) -> dict[str, Any]:
    """Captured values by path; of a module that returns several, the first."""
    flat = {path: leaf[0] for path, leaf in params_lib.flatten(captured).items()}
    return {path: leaf[0] if isinstance(leaf, tuple) else leaf for path, leaf in flat.items()}


def hidden_states(captured: Mapping[str, Any]) -> list[Any]:
    """What enters the first block, and what leaves each."""
    first = captured.get("pre_norm/__call__", captured["embedded"])
    return [first, *captured["blocks/__call__"]]


def modules(kind: str, captured: Mapping[str, Any], encoded: Encoded | Stream, prefix: str) -> dict[str, Any]:
    """The output of every known module of a recorded encoder, as ``mid/<prefix><module>``.

    Args:
      kind: a key of ``MODULES``.
      captured: the encoder's own, from ``seen``.
      prefix: of the module's names, with its dot.
    """
    states = hidden_states(captured)
    whole = {"last_hidden_state": encoded.tokens, "pooler_output": encoded.pooled}
    found = {name: value for name, value in whole.items() if value is not None}
    found |= {f"hidden_states.{i}": state for i, state in enumerate(states)}
    captured = {**captured, "encoded": states[-1], "pooled": encoded.pooled}
    if "pooler/attention/weights" in captured:  # the recorded module gives their mean over heads
        captured["probe_weights"] = np.mean(captured["pooler/attention/weights"], axis=1)
    for name, path in MODULES[kind].items():
        value = captured.get(path)
        if value is None:
            continue
        if "{layer}" in name:
            found |= {name.format(layer=i): layer for i, layer in enumerate(value)}
        else:
            found[name] = value
    return {f"mid/{prefix}{name}": value for name, value in found.items()}


def load(table: Sequence[Rule], shapes: Any, weights: Mapping[str, np.ndarray]) -> tuple[rules.Plan, Any]:
    """The plan, and parameters read from a fixture."""
    shapes = nn.meta.unbox(shapes)
    flat = {path: tuple(leaf.shape) for path, leaf in params_lib.flatten(shapes).items()}
    plan = rules.plan(table, flat)
    return plan, rules.read(plan, weights, shapes, ignored=vision.IGNORED)


def channels_last(pixels: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(pixels, 1, -1))


def gradients(
    objective: Callable[[Any], tuple[jax.Array, Any]], params: Any, plan: rules.Plan
) -> tuple[Any, dict[str, Any]]:
    """What the objective gives beside its value; its value, and its gradient by tensor. One program."""
    (value, aux), gradient = jax.device_get(jax.jit(jax.value_and_grad(objective, has_aux=True))(params))
    exported = rules.export(plan, gradient)
    return aux, {"out_objective": value, **{f"grad/{key}": array for key, array in exported}}


def run_vision(fixture: Any) -> dict[str, Any]:
    """Every recorded value of an image encoder."""
    kind, arrays = fixture.config["model_type"], fixture.arrays
    model, pixels = ViT(vision.read_vision(fixture.config)), channels_last(arrays["in_pixel_values"])
    table = vision.vision_rules(kind, source=vision.find_prefix(fixture.weights, kind))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), pixels)["params"])
    plan, params = load(table, shapes, fixture.weights)

    main, cotangent = fixture.meta["main_output"], np.asarray(arrays["in_cotangent"])

    def objective(params: Any) -> tuple[jax.Array, tuple]:
        encoded, captured = model.apply(
            {"params": params}, pixels, method="encode", mutable=["intermediates"], capture_intermediates=True
        )
        return jnp.sum(results(encoded)[main] * cotangent), (encoded, captured["intermediates"])

    (encoded, captured), found = gradients(objective, params, plan)
    captured = seen(captured)
    states = hidden_states(captured)
    return {
        **results(encoded),
        **{f"out_hidden_states.{i}": state for i, state in enumerate(states)},
        **{f"out_attentions.{i}": w for i, w in enumerate(captured["blocks/attention/weights"])},
        **modules(kind, captured, encoded, ""),
        **found,
        # Thousands of terms of either sign: in float32 their sum would lose more than the recording allows.
        "out_objective": np.sum(np.asarray(results(encoded)[main], np.float64) * cotangent),
    }


def results(encoded: Any) -> dict[str, Any]:
    found = {"out_last_hidden_state": encoded.tokens}
    return found if encoded.pooled is None else {**found, "out_pooler_output": encoded.pooled}


def pair_batch(config: JointConfig, arrays: Mapping[str, np.ndarray]) -> Batch:
    """A row for each recorded image and text; what no mask hides counts as text."""
    tokens = np.asarray(arrays["in_input_ids"], np.int32)
    pixels = np.moveaxis(arrays["in_pixel_values"], 1, -1)
    rows, seen = len(tokens), arrays.get("in_attention_mask", np.ones_like(tokens))
    blank = jax.tree.map(lambda x: np.repeat(x, rows, axis=0), config.smallest_batch(1))
    return blank.replace(
        tokens=tokens,
        segment_ids=np.asarray(seen > 0, np.int32),
        tiles=pixels[:, None],
        visual_index=np.zeros((rows, 1), np.int32),  # some token of the only tile
    )


def pair_loss(pairs: PairVectors) -> jax.Array:
    """The published loss, by the head that has a bias or none: rows are pairs, and the mean is over them."""
    rows = jnp.arange(len(pairs.image), dtype=jnp.int32)
    options: Any = {"image_ids": rows, "text_ids": rows, "chunk": len(rows)}
    if pairs.bias is None:
        sums = softmax_sums(pairs.image, pairs.text, pairs.scale, **options)
    else:
        sums = sigmoid_sums(pairs.image, pairs.text, pairs.scale, pairs.bias, **options)
    return sums.loss / len(rows)


def similarity(pairs: PairVectors) -> jax.Array:
    """``exp(scale) * <image, text> (+ bias)`` for every pair."""
    logits = jnp.exp(pairs.scale) * jnp.matmul(pairs.image, pairs.text.T, precision="highest")
    return logits if pairs.bias is None else logits + pairs.bias


def run_pair(fixture: Any) -> dict[str, Any]:
    """Every recorded value of an image-text pair."""
    kind, config = fixture.config["model_type"], vision.read_contrastive(fixture.config)
    model, batch = config.build(), pair_batch(config, fixture.arrays)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch, {})["params"])
    plan, params = load(vision.contrastive_rules(kind), shapes, fixture.weights)

    def objective(params: Any) -> tuple[jax.Array, tuple]:
        output, captured = model.apply(
            {"params": params},
            batch,
            {},
            mutable=["intermediates"],
            capture_intermediates=lambda _, method: method in ("__call__", "encode"),
        )
        pairs = output.predictions["pairs"]
        loss = pair_loss(pairs)
        return loss, (output.streams, pairs, similarity(pairs), captured["intermediates"])

    (streams, pairs, logits, captured), found = gradients(objective, params, plan)
    text = streams["text"]
    (image,) = captured["image"].pop("encode")  # with the class token, which is no feature
    return {
        **found,
        "out_loss": found["out_objective"],
        "out_logits_per_image": logits,
        "out_logits_per_text": logits.T,
        "out_image_embeds": pairs.image,
        "out_text_embeds": pairs.text,
        "out_vision_model_output.last_hidden_state": image.tokens,
        "out_vision_model_output.pooler_output": streams["image"].pooled,
        "out_text_model_output.last_hidden_state": text.tokens,
        "out_text_model_output.pooler_output": text.pooled,
        **modules(f"{kind}_vision_model", seen(captured["image"]), image, "vision_model."),
        **modules("text", seen(captured["text"]), text, "text_model."),
    }
