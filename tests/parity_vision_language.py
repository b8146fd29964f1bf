"""Runs LLaVA and DeepSeek-VL on recorded inputs and gives every value that was recorded of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity_vision
from parity_conv import channels_first, sam_modules, shown
from parity_language import Seen, cross_entropy, routed_everywhere, training
from parity_processor import image_processor_outputs
from parity_vision import channels_last

from vl_jax import params as params_lib
from vl_jax.batch import Batch
from vl_jax.generation.choice import GenerationConfig
from vl_jax.generation.decode import decode, prefill
from vl_jax.generation.generate import generate
from vl_jax.interop import rules
from vl_jax.interop.vision_language import (
    IGNORED,
    read_vision_language,
    vision_language_rules,
    vision_language_stacks,
)
from vl_jax.language.decoder import LayerContext
from vl_jax.layout import abstract
from vl_jax.model import LANGUAGE, VisionLanguage

Found = dict[str, Any]

SEQUENCE = ("tokens", "positions", "segment_ids", "branch_ids", "visual_slot")  # fields that are [B T]


class Model:
    """A model with the weights of a fixture, and its inputs as a batch."""

    def __init__(self, fixture: Any):
        self.arrays, self.published = fixture.arrays, fixture.config
        self.config = read_vision_language(fixture.config)
        self.network = VisionLanguage(self.config)
        self.rules = vision_language_rules(fixture.config, fixture.weights)
        shapes = abstract(self.config)
        if self.config.moe.scheme == "loss_free":
            shape = (len(self.config.language.sparse_layers), self.config.moe.num_experts)
            shapes = {**shapes, "routing": {"bias": jax.ShapeDtypeStruct(shape, jnp.float32)}}
        tree = rules.read(self.plan(shapes), fixture.weights, shapes, ignored=IGNORED)
        self.state = {LANGUAGE: tree.pop("routing", {})}
        self.params = tree
        self.pixels = channels_last(self.arrays["in_pixel_values"])
        high = self.arrays.get("in_high_res_pixel_values")
        self.high_pixels = None if high is None else channels_last(high)
        self.batch = self._batch()

    def plan(self, tree: Any) -> rules.Plan:
        shapes = {path: tuple(leaf.shape) for path, leaf in params_lib.flatten(tree).items()}
        return rules.plan(self.rules, shapes, vision_language_stacks(self.config))

    def _batch(self) -> Batch:
        """Images fill the places of image tokens one after the other, as in the recorded models."""
        tokens, fields = self.arrays["in_input_ids"].astype(np.int32), self.published
        placeholder = fields["image_token_id" if "image_token_id" in fields else "image_token_index"]
        visual = tokens == placeholder
        counts = visual.sum(axis=1)
        images = counts // (counts.sum() // len(self.pixels))
        slots = np.arange(counts.max())
        index = np.where(slots < counts[:, None], slots, -1)

        def by_row(pixels: Any) -> jax.Array | None:
            if pixels is None:
                return None
            parts = np.split(np.asarray(pixels), np.cumsum(images)[:-1])
            padding = [(0, 0)] * (pixels.ndim - 1)
            return jnp.stack([np.pad(part, [(0, images.max() - len(part)), *padding]) for part in parts])

        zeros = jnp.zeros_like(tokens)
        return Batch(
            tokens=jnp.asarray(tokens),
            positions=zeros + jnp.arange(tokens.shape[1], dtype=jnp.int32),
            segment_ids=jnp.asarray(self.arrays["in_attention_mask"], jnp.int32),
            branch_ids=zeros,
            visual_slot=jnp.asarray(np.where(visual, np.cumsum(visual, axis=1) - 1, -1), jnp.int32),
            target_index=zeros,
            targets=zeros,
            loss_weights=zeros.astype(jnp.float32),
            tiles=by_row(self.pixels),
            visual_index=jnp.asarray(index, jnp.int32),
            visual_start=jnp.zeros_like(index, jnp.int32),
            visual_segment_ids=jnp.asarray(index >= 0, jnp.int32),
            high_tiles=by_row(self.high_pixels),
        )

    def logits(self, params: Any) -> tuple[jax.Array, jax.Array]:
        """[B T V], of which those at padding mean nothing, and what enters the decoder."""

        def run(network: VisionLanguage) -> tuple[jax.Array, jax.Array]:
            vision, _ = network.see(self.batch)
            output = network(self.batch, self.state, seen=vision)
            return network.logits(output.hidden), network.embed(self.batch, vision)

        return self.network.apply({"params": params}, method=run)  # pyright: ignore[reportReturnType]


def run(fixture: Any) -> Found:
    """Every recorded value of a whole model."""
    model = Model(fixture)
    trained, whole, embedded = _training(model)
    tokens, (table, hidden, logits), captured = _show(model, embedded)
    found = {**trained, **_images(model, tokens, captured), **_decoding(model)}
    found |= _text(model, (table, embedded, hidden), captured["language"])
    # Logits are those of the whole model but where it sees nothing.
    found["out_logits"] = np.where(model.batch.segment_ids[..., None] > 0, whole, logits)
    return found | image_processor_outputs(fixture)


def _training(model: Model) -> tuple[Found, np.ndarray, np.ndarray]:
    """The loss, its gradient by tensor, and four optimiser steps; logits, and what enters the decoder."""
    labels = jnp.asarray(model.arrays["in_labels"])

    def loss(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        logits, embedded = model.logits(params)
        return cross_entropy(logits, labels), (logits, embedded)

    gradient, (logits, embedded), found = training(loss, model.params)
    found["out_loss"] = found["out_objective"] = found["out_train_losses"][0]
    exported = rules.export(model.plan(gradient), gradient)
    return found | {f"grad/{key}": array for key, array in exported}, logits, embedded


def _show(model: Model, embedded: np.ndarray) -> tuple[jax.Array, tuple, Found]:
    """The tokens of the images; the table's rows, states and logits of the text; what modules showed.

    The recorded models compute something at padding too, where it sees what is no padding. Our model sees
    nothing there, so its decoder is shown the recorded mask.
    """
    batch, length = model.batch, model.batch.tokens.shape[1]
    valid = jnp.asarray(batch.segment_ids > 0)
    context = LayerContext(
        positions=batch.positions,
        mask=jnp.tril(jnp.ones((length, length), bool)) & valid[:, None, :],
        routing=routed_everywhere(batch.tokens.shape),
        vision=None,
        vision_mask=None,
        length=None,
    )

    def captures(module: Any, method: str) -> bool:
        return shown(module, method) or method == "encode"

    @jax.jit
    def run(params: Any, embedded: jax.Array) -> tuple:
        def show(network: VisionLanguage) -> tuple:
            tokens = network.adapter.project(network.encode(model.pixels, model.high_pixels).tokens)
            hidden, _, _, _ = network.language(embedded, context, model.state[LANGUAGE], None)
            return tokens, (network.language.embed(batch.tokens), hidden, network.logits(hidden))

        return model.network.apply(
            {"params": params}, method=show, mutable=["intermediates"], capture_intermediates=captures
        )  # pyright: ignore[reportReturnType]

    (tokens, text), captured = jax.device_get(run(model.params, embedded))
    return tokens, text, captured["intermediates"]


def _images(model: Model, tokens: np.ndarray, captured: Found) -> Found:
    """What becomes of the images."""
    (encoded,) = captured["encoder"].pop("encode")
    inside = parity_vision.seen(captured["encoder"])
    # The names inside are those of SigLIP too; before them stands what either model calls its encoder.
    kind = (model.published.get("vision_config") or {}).get("model_type", "clip_vision_model")
    found: Found = {}
    for prefix in ("model.vision_tower.", "model.vision_model."):
        found |= parity_vision.modules(kind, inside, encoded, prefix)
    found |= dict.fromkeys(("mid/model.aligner", "mid/model.multi_modal_projector"), tokens)
    found["out_image_hidden_states"] = tokens.reshape(-1, tokens.shape[-1])
    flat = {path.removesuffix("/__call__"): value for path, value in params_lib.flatten(captured).items()}
    if model.config.high_resolution is not None:
        return found | _high_resolution(model, flat)
    for root, layers, hidden in (
        ("aligner", ("linear1", "linear2"), "activation"),
        ("multi_modal_projector", ("linear_1", "linear_2"), "act"),
    ):
        found |= {f"mid/model.{root}.{n}": flat[f"adapter/layer_{i}"][0] for i, n in enumerate(layers)}
        found[f"mid/model.{root}.{hidden}"] = flat["adapter/hidden"][0]
    return found


def _high_resolution(model: Model, flat: Found) -> Found:
    """What the second tower showed, and the aligner that joins it with the first."""
    config, prefix = model.config.high_resolution, "mid/model.high_res_vision_"
    assert config is not None
    inside = {k.removeprefix("high/encoder/"): v for k, v in flat.items() if k.startswith("high/encoder/")}
    inner = f"{prefix}model.vision_encoder."
    found = sam_modules(config.encoder, list(model.arrays), inside, inner)
    first = config.encoder.global_layers[0]
    return found | {
        f"{prefix}model.last_hidden_state": found[f"{inner}neck"],
        f"{prefix}model.hidden_states.{first + 1}": flat["high/encoder/stages"][0].first_global,
        f"{prefix}neck": channels_first(flat["high/neck"][0]),
        f"{prefix}proj": channels_first(flat["high/reduce"][0]),
        f"{prefix}proj@call1": channels_first(flat["high/reduce"][1]),
        "mid/model.aligner.vision_proj": flat["aligner/low"][0],
        "mid/model.aligner.high_res_vision_proj": flat["aligner/high"][0],
        "mid/model.aligner.act": flat["aligner/hidden"][0],
        "mid/model.aligner.proj": flat["aligner/project"][0],
    }


def _text(model: Model, ends: tuple, captured: Found) -> Found:
    """What the language model makes of them; ``ends``: rows of the table, first state, last state."""
    table, embedded, hidden = ends
    language = SimpleNamespace(decoder=model.config.language, moe=model.config.moe)
    seen = Seen(SimpleNamespace(config=language), captured)  # pyright: ignore[reportArgumentType]
    found = seen.layers(embedded, hidden)
    own = {"model.embed_tokens": table, "model.norm": hidden}
    for name, recorded in model.arrays.items():
        module = name.replace("mid/model.language_model.", "model.")
        if module != name:
            value = own[module] if module in own else seen.submodule(module, recorded.shape)
            if value is not None:
                found[name] = np.asarray(value).reshape(recorded.shape)
    return found


def _decoding(model: Model) -> Found:
    """The first row, token by token over the cache, and its greedy continuation."""
    if "in_decode_input_ids" not in model.arrays:
        return {}
    arrays, network = model.arrays, model.network
    row = jax.tree.map(lambda x: np.asarray(x)[:1], model.batch)
    length, filled = row.tokens.shape[1], int(arrays["out_decode_prefill_len"])
    prompt = row.replace(**{name: getattr(row, name)[:, :filled] for name in SEQUENCE})

    @jax.jit
    def read(params: Any, prompt: Batch, following: jax.Array) -> jax.Array:
        """Logits after the prompt, and after each token that follows it."""

        def step(cache: Any, new: tuple) -> tuple[Any, jax.Array]:
            logits, cache = decode(params, model.state, prompt, vision, *new, cache, model=network)
            return cache, logits

        logits, cache, vision = prefill(params, model.state, prompt, model=network, slots=length, chunk=None)
        _, steps = jax.lax.scan(step, cache, (following, jnp.arange(len(following))))
        return jnp.concatenate([logits[None], steps]).swapaxes(0, 1)

    steps = read(model.params, prompt, row.tokens.T[filled:])
    config = GenerationConfig(max_new_tokens=arrays["out_greedy_tokens"].shape[1])
    tokens = generate(model.params, model.state, row, model=network, config=config, stop=(-1,))
    return {
        "out_decode_logits": np.reshape(steps, arrays["out_decode_logits"].shape),
        "out_greedy_tokens": tokens,
    }
