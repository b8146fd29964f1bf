"""Runs DeepSeek-VL2 on recorded inputs, whole and in parts, and gives every value that was recorded of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity_language import cross_entropy, first_of, routed_everywhere

from vl_jax import params as params_lib
from vl_jax.batch import Batch
from vl_jax.data.images import tiling
from vl_jax.encoders.adapter import Adapter
from vl_jax.encoders.vit import ViT
from vl_jax.generation.choice import GenerationConfig
from vl_jax.generation.decode import decode, prefill
from vl_jax.generation.generate import generate
from vl_jax.interop import rules
from vl_jax.interop.deepseek_vl2 import deepseek_vl2_rules, projector_rules, read_deepseek_vl2, read_projector
from vl_jax.interop.language import language_stacks, read_rope
from vl_jax.interop.vision import IGNORED, read_vision, vision_rules
from vl_jax.layout import abstract
from vl_jax.model import LANGUAGE, VisionLanguage, init_cache
from vl_jax.moe import routing
from vl_jax.moe.layer import DynamicMoE
from vl_jax.nn import rope

# Recorded with the processor, whose cases are the inputs.
PROMPTS = {
    "vlm_wide": "one_wide",
    "vlm_tall": "one_tall",
    "vlm_three": "three_images_untiled",
    "vlm_two": "two_images_tiled",
}
CHUNK = 17  # of the recorded chunked prefill


class Model:
    """A model with the weights of a fixture."""

    def __init__(self, fixture: Any):
        self.arrays, self.published = fixture.arrays, fixture.config
        self.config = read_deepseek_vl2(fixture.config)
        self.network = VisionLanguage(self.config)
        self.rules = deepseek_vl2_rules(self.config)
        shapes = abstract(self.config)
        if self.config.moe.scheme == "loss_free":
            shape = (len(self.config.language.sparse_layers), self.config.moe.num_experts)
            shapes = {**shapes, "routing": {"bias": jax.ShapeDtypeStruct(shape, jnp.float32)}}
        tree = rules.read(self.plan(shapes), fixture.weights, shapes, ignored=IGNORED)
        self.state = {LANGUAGE: tree.pop("routing", {})}
        self.params = tree

    def plan(self, tree: Any) -> rules.Plan:
        shapes = {path: tuple(leaf.shape) for path, leaf in params_lib.flatten(tree).items()}
        return rules.plan(self.rules, shapes, language_stacks(self.config.language))

    @functools.cached_property
    def forward(self) -> Any:
        """(params, batch) -> ((hidden, logits, losses), intermediates)."""

        @jax.jit
        def run(params: Any, batch: Batch) -> tuple:
            def whole(network: VisionLanguage) -> tuple:
                output = network(batch, self.state)
                return output.hidden, network.logits(output.hidden), output.routed.get(LANGUAGE)

            return self.network.apply(
                {"params": params}, method=whole, mutable=["intermediates"], capture_intermediates=True
            )

        return run

    def text(self, tokens: np.ndarray, mask: np.ndarray | None = None, positions: Any = None) -> Batch:
        """A batch of text; in the recordings padding is routed too, but never attended to."""
        rows, length = tokens.shape
        valid = np.ones_like(tokens, np.int32) if mask is None else mask.astype(np.int32)
        plain = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
        small = jax.tree.map(lambda a: np.repeat(a, rows, axis=0), self.config.smallest_batch(1))
        return dataclasses.replace(
            small,
            tokens=tokens.astype(np.int32),
            positions=plain if positions is None else positions.astype(np.int32),
            segment_ids=valid,
            branch_ids=np.zeros_like(valid),
            visual_slot=np.full_like(valid, -1),
        )

    def batch(self, inputs: Mapping[str, np.ndarray]) -> Batch:
        """Arrays of the published processor [B ...] as a batch."""
        tokens = inputs["input_ids"]
        mask = inputs.get("attention_mask", np.ones_like(tokens))
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        pixels = np.moveaxis(inputs["images"], 2, -1)
        rows, count = pixels.shape[:2]
        side = self.config.tile_tokens_side
        views = "global_local" if self.published.get("global_view_pos", "head") == "head" else "local_global"
        index = []
        for crops in inputs["images_spatial_crop"]:
            grids = [(int(w), int(h)) for w, h in crops if w and h]
            layouts, first = [np.zeros(0, np.int32)], 0
            for grid in grids:
                layouts.append(
                    tiling.layout(grid, tile_tokens_side=side, views=views, first_tile=first, num_tiles=count)
                )
                first += tiling.num_views_tiles(grid, views)
            index.append(np.concatenate(layouts))
        width = max(1, *(len(i) for i in index))
        visual = inputs["images_seq_mask"]
        slots = np.where(visual, np.cumsum(visual, axis=1) - 1, -1)
        return dataclasses.replace(
            self.text(tokens, mask, positions),
            visual_slot=slots.astype(np.int32),
            tiles=np.rint((pixels * 0.5 + 0.5) * 255).astype(np.uint8),
            visual_index=np.stack([np.pad(i, (0, width - len(i)), constant_values=-1) for i in index]),
            visual_start=np.zeros((rows, width), np.int32),
            visual_segment_ids=np.ones((rows, width), np.int32),
        )

    def embed(self, batch: Batch) -> dict[str, Any]:
        """Tile tokens, and what enters the decoder."""

        def run(network: VisionLanguage) -> tuple:
            tiles = batch.tiles.reshape(-1, *batch.tiles.shape[2:])
            features = network.encoder(tiles).tokens
            return features, network.adapter.project(features), network.embed(batch, network.see(batch)[0])

        batch = jax.tree.map(jnp.asarray, batch)
        features, projected, embedded = self.network.apply({"params": self.params}, method=run)  # pyright: ignore
        return {"vision_features": features, "projector_out": projected, "inputs_embeds": embedded}

    def continued(self, batch: Batch, count: int, chunk: int | None = None) -> np.ndarray:
        """Greedy ids after every row."""
        config = GenerationConfig(max_new_tokens=count, prefill_chunk=chunk)
        device = jax.tree.map(jnp.asarray, batch)
        ids = generate(self.params, self.state, device, model=self.network, config=config, stop=(-1,))
        return np.asarray(ids)


def run(fixture: Any) -> dict[str, Any]:
    """Every recorded value of a whole model."""
    model = Model(fixture)
    files = {name.partition("/")[0] for name in fixture.arrays}
    found: dict[str, Any] = {}
    for file in sorted(files):
        values = _part(model, file, fixture)
        found |= {f"{file}/{name}": value for name, value in values.items()}
    return found


def _part(model: Model, file: str, fixture: Any) -> dict[str, Any]:
    recorded = {
        name.partition("/")[2]: fixture.arrays[name] for name in fixture.arrays if name.startswith(f"{file}/")
    }
    if file == "lm_text":
        return _text(model, recorded)
    if file == "lm_leftpad":
        return _padded(model, recorded)
    if file == "lm_cache":
        return _cached(model, recorded)
    if file.startswith("train_"):
        return _training(model, recorded)
    if file in PROMPTS:
        with np.load(fixture.processor / "cases" / f"{PROMPTS[file]}.npz") as case:
            return _prompt(model, recorded, {name: case[name][None] for name in case.files})
    if file == "vlm_batch_left":
        return _batch(model, _load(fixture.processor / "batchify_left.npz"))
    if file == "vlm_sft_right":
        return _supervised(model, _load(fixture.processor / "batchify_right.npz"))
    return {}


def _load(path: Any) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def _text(model: Model, recorded: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tokens = recorded["input_ids"]
    (hidden, logits, _), captured = model.forward(model.params, model.text(tokens))
    flat = {p: first_of(v) for p, v in params_lib.flatten(captured["intermediates"]["language"]).items()}
    place = {n: (r.name, i) for r in model.config.language.runs for i, n in enumerate(r.layers)}

    def of(layer: int, path: str) -> Any:
        name, index = place[layer]
        return jax.tree.map(lambda a: a[index], flat[f"{name}/{path}"])

    count = model.config.language.num_layers
    embedded = model.params["language"]["embedding"][tokens]
    states = [embedded, *(of(i, "__call__") for i in range(count - 1)), hidden]
    found = {f"hidden_{i}": state for i, state in enumerate(states)}
    found |= {"logits": logits, "loss_ce": cross_entropy(logits, jnp.asarray(tokens))}
    found["attn_layer0"] = of(0, "attention/weights")
    for layer in model.config.language.sparse_layers:
        found[f"gate{layer}_in"] = of(layer, "mlp_norm/__call__")
        given = recorded[f"gate{layer}_in"]
        assignment, output = _experts(model, layer, jnp.asarray(given))
        top_k = assignment.experts.shape[-1]
        experts, gates = (np.asarray(a).reshape(-1, top_k) for a in (assignment.experts, assignment.gates))
        order = np.argsort(experts, axis=1)
        found[f"gate{layer}_topk_idx_sorted"] = np.take_along_axis(experts, order, axis=1)
        found[f"gate{layer}_topk_weight_sorted"] = np.take_along_axis(gates, order, axis=1)
        found[f"moe{layer}_out"] = output
    return found


def _experts(model: Model, layer: int, x: jax.Array) -> tuple[routing.TokenChoice, jax.Array]:
    """Assignment and output of one sparse layer for a given input."""
    name, index = next(
        (r.name, r.layers.index(layer)) for r in model.config.language.runs if layer in r.layers
    )
    params = jax.tree.map(lambda a: a[index], model.params["language"][name]["moe"])
    sparse = model.config.language.sparse_layers.index(layer)
    state = jax.tree.map(lambda a: a[sparse], model.state[LANGUAGE])
    (y, _), captured = DynamicMoE(model.config.moe).apply(
        {"params": params}, x, routed_everywhere(x.shape[:2]), state, mutable=["intermediates"]
    )  # pyright: ignore
    return captured["intermediates"]["assignment"][0], y


def _padded(model: Model, recorded: Mapping[str, np.ndarray]) -> dict[str, Any]:
    found = {}
    for name, positions in (("explicit", recorded["position_ids"]), ("default", None)):
        batch = model.text(recorded["input_ids"], recorded["attention_mask"], positions)
        found[f"logits_{name}_positions"] = model.forward(model.params, batch)[0][1]
    return found


def _cached(model: Model, recorded: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tokens, filled = recorded["input_ids"], int(recorded["prefill_len"])
    batch = jax.tree.map(jnp.asarray, model.text(tokens[:, :filled]))
    variables = {"params": model.params}

    def whole(network: VisionLanguage, cache: Any) -> tuple:
        output = network(batch, model.state, cache=cache)
        return network.logits(output.hidden), output.cache

    cache = init_cache(model.config, batch=len(tokens), slots=tokens.shape[1])
    logits, cache = model.network.apply(variables, cache, method=whole)  # pyright: ignore
    steps, kept = [logits], cache.runs[0]
    found = {f"cache_layer0_{n}_after_prefill": v[:, :, :filled] for n, v in _names(model, kept).items()}
    vision = jnp.zeros((len(tokens), 2, model.config.language.embed_dim))
    step = jax.jit(functools.partial(decode, model.params, model.state, model=model.network))
    for i in range(filled, tokens.shape[1]):
        one, cache = step(batch, vision, jnp.asarray(tokens[:, i], jnp.int32), i - filled, cache)
        steps.append(one[:, None])
    found |= {f"cache_layer0_{n}_final": v for n, v in _names(model, cache.runs[0]).items()}
    return {**found, "logits_incremental": jnp.concatenate(steps, axis=1)}


def _names(model: Model, kept: tuple[Any, ...]) -> dict[str, Any]:
    """The first layer's cache in the recorded form [B heads S width]."""
    first = [np.asarray(a[0]) for a in kept]
    if first[0].ndim == 3:  # latent, shared key
        latent, key = (a[:, None] for a in first)
        return {"k": key, "v": latent}
    return {"k": first[0].swapaxes(1, 2), "v": first[1].swapaxes(1, 2)}


def _training(model: Model, recorded: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Loss, auxiliary losses and gradients, with the recorded weight and scope of the auxiliary loss."""
    scope = "sequence" if recorded["seq_aux"] else "batch"
    balance = dataclasses.replace(model.config.moe.balance, weight=float(recorded["alpha"]), scope=scope)
    moe = dataclasses.replace(model.config.moe, balance=balance)
    network = VisionLanguage(dataclasses.replace(model.config, moe=moe))
    batch = jax.tree.map(jnp.asarray, model.text(recorded["input_ids"]))

    def loss(params: Any) -> tuple[jax.Array, tuple]:
        def whole(network: VisionLanguage) -> tuple:
            output = network(batch, model.state)
            return network.logits(output.hidden), output.routed.get(LANGUAGE)

        logits, routed = network.apply({"params": params}, method=whole)  # pyright: ignore
        entropy = cross_entropy(logits, batch.tokens)
        balance = routed.losses["balance"]
        return entropy + jnp.sum(balance), (entropy, balance)

    (_, (entropy, balance)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(model.params)
    found = {"loss_ce": entropy}
    layers = model.config.language.sparse_layers
    found |= {f"aux_loss_layer{n}": value for n, value in zip(layers, balance, strict=True)}
    return found | {f"grad:{key}": array for key, array in rules.export(model.plan(gradient), gradient)}


def _prompt(
    model: Model, recorded: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    batch = model.batch(inputs)
    logits = model.forward(model.params, batch)[0][1]
    count = recorded["greedy_ids"].shape[1]
    device = jax.tree.map(jnp.asarray, batch)
    slots = batch.tokens.shape[1]
    last, _, _ = prefill(model.params, model.state, device, model=model.network, slots=slots, chunk=CHUNK)
    return {
        **model.embed(batch),
        "logits": logits[:, -recorded["logits"].shape[1] :],
        "greedy_ids": model.continued(batch, count),
        "last_logits_chunked_prefill": last,
    }


def _batch(model: Model, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    batch = model.batch(inputs)
    return {
        "inputs_embeds": model.embed(batch)["inputs_embeds"],
        "position_ids": batch.positions,
        "logits_last": model.forward(model.params, batch)[0][1][:, -1],
        "greedy_ids": model.continued(batch, 8),
    }


def _supervised(model: Model, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    labels = inputs["labels"]
    logits = model.forward(model.params, model.batch(inputs))[0][1]
    return {
        "loss": cross_entropy(logits, jnp.asarray(labels)),
        "n_target": np.array((labels[:, 1:] != -100).sum()),
    }


def run_vision(fixture: Any) -> dict[str, Any]:
    """Every recorded value of the vision encoder."""
    config = read_vision(fixture.config)
    encoder, pixels = ViT(config), jnp.moveaxis(jnp.asarray(fixture.arrays["io/images"]), 1, -1)
    shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), pixels)["params"])
    params = _read(vision_rules("vision", source="vision."), fixture.weights, _unboxed(shapes))
    encoded, captured = encoder.apply(
        {"params": params}, pixels, mutable=["intermediates"], capture_intermediates=True
    )  # pyright: ignore
    seen = captured["intermediates"]
    blocks = first_of(seen["blocks"]["__call__"])
    found = {"features": encoded.tokens, "after_pos_embed": seen["embedded"][0]}
    found["patch_embed"] = first_of(seen["stem"]["__call__"])
    found |= {f"block_{i}": block for i, block in enumerate(blocks)}
    return {f"io/{name}": value for name, value in found.items()}


def run_projector(fixture: Any) -> dict[str, Any]:
    """The output of a projector."""
    found = {}
    for name in fixture.arrays:
        case, _, array = name.rpartition("/")
        if array != "x":
            continue
        x = jnp.asarray(fixture.arrays[name])
        config = read_projector(fixture.config)
        adapter = Adapter(config, fixture.config["n_embed"])
        index = jnp.zeros((1, 1), jnp.int32)
        shapes = jax.eval_shape(adapter.init, jax.random.key(0), x[None], index)["params"]
        layers = {"adapter": {k: v for k, v in _unboxed(shapes).items() if k.startswith("layer")}}
        params = _read(projector_rules(config), fixture.weights, layers)["adapter"]
        blank = jnp.zeros(fixture.config["n_embed"])
        variables = {"params": {**params, "newline": blank, "separator": blank}}
        found[f"{case}/y"] = adapter.apply(variables, x, method="project")
    return found


def run_rope(fixture: Any) -> dict[str, Any]:
    """Tables and rotated queries and keys of every recorded rotary embedding."""
    found = {}
    for case, settings in fixture.config.items():
        config = read_rope({"rope_theta": settings["base"], **settings}, pairs="adjacent")
        dim = settings["dim"]
        found[f"rope/{case}_inv_freq"] = rope.frequencies(config, dim)
        length = fixture.arrays[f"rope/{case}_cos"].shape[0]
        angle = rope.angles(jnp.arange(length)[None], dim=dim, config=config)[0]
        for name, function in (("cos", jnp.cos), ("sin", jnp.sin)):
            table = function(angle) * config.amplitude
            found[f"rope/{case}_{name}"] = jnp.concatenate([table, table], axis=-1)
        angle = rope.angles(jnp.asarray(fixture.arrays[f"rope/{case}_positions"]), dim=dim, config=config)
        for name in ("q", "k"):
            x = jnp.asarray(fixture.arrays[f"rope/{case}_{name}_in"]).swapaxes(1, 2)
            found[f"rope/{case}_{name}_out"] = rope.rotate(x, angle, config).swapaxes(1, 2)
    return found


def _read(table: Any, weights: Any, shapes: Any) -> Any:
    sizes = {path: tuple(leaf.shape) for path, leaf in params_lib.flatten(shapes).items()}
    return rules.read(rules.plan(table, sizes), weights, shapes, ignored=(*IGNORED, r"(?!vision\.).*"))


def _unboxed(tree: Any) -> Any:
    return jax.tree.map(lambda b: b.value, tree, is_leaf=lambda b: hasattr(b, "value"))
