"""Runs DeepSeek-VL2 on recorded inputs and gives every value that was recorded of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parity_language import cross_entropy, first_of, routed_everywhere

from vl_jax import params as params_lib
from vl_jax.batch import FIELDS, Batch, Field
from vl_jax.data.images import tiling
from vl_jax.generation.choice import GenerationConfig
from vl_jax.generation.decode import decode, prefill
from vl_jax.generation.generate import generate
from vl_jax.interop import rules
from vl_jax.interop.deepseek_vl2 import deepseek_vl2_rules, read_deepseek_vl2
from vl_jax.interop.language import language_stacks
from vl_jax.interop.vision import IGNORED
from vl_jax.layout import abstract
from vl_jax.model import LANGUAGE, VisionLanguage
from vl_jax.moe import routing
from vl_jax.moe.layer import DynamicMoE

# Recorded with the processor, whose cases are the inputs.
PROMPTS = {
    "vlm_wide": "one_wide",
    "vlm_tall": "one_tall",
    "vlm_three": "three_images_untiled",
    "vlm_two": "two_images_tiled",
}
BATCHES = {"vlm_batch_left": "batchify_left", "vlm_sft_right": "batchify_right"}
TEXT = "lm_text"
CONTINUED = (*PROMPTS, "vlm_batch_left")  # what was recorded of these goes on behind their last token
CHUNK = 17  # of the recorded chunked prefill


# What is looked at of every layer, if it is a text that passes.
LAYER = ("__call__", "attention/weights", "mlp_norm/__call__")


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

    def batch(self, inputs: Mapping[str, np.ndarray], count: int) -> Batch:
        """Arrays of the published processor [B ...] as a batch of ``count`` tiles a row."""
        tokens = inputs["input_ids"]
        mask = inputs.get("attention_mask", np.ones_like(tokens))
        positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        pixels = np.moveaxis(inputs["images"], 2, -1)
        rows, missing = len(pixels), count - pixels.shape[1]
        pixels = np.pad(pixels, [(0, 0), (0, missing), (0, 0), (0, 0), (0, 0)])
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


class Rows:
    """Recorded batches as rows of one batch, so that one program serves them all.

    What is shorter than the longest is filled up as in any batch: sequences behind their last token, but
    those of ``CONTINUED`` before their first, so that they end together.
    """

    def __init__(self, batches: Mapping[str, Batch]):
        self.batches = batches
        self.batch = Batch(**{name: self._fill(name, field) for name, field in FIELDS.items()})

    def _fill(self, name: str, field: Field) -> np.ndarray:
        arrays = {key: np.asarray(getattr(batch, name)) for key, batch in self.batches.items()}
        longest, filled = np.max([a.shape[1:] for a in arrays.values()], axis=0), []
        for key, array in arrays.items():
            missing = [(0, int(n)) for n in longest - array.shape[1:]]
            if field.axes == ("T",) and key in CONTINUED:
                missing = [(missing[0][1], 0)]
            filled.append(np.pad(array, [(0, 0), *missing], constant_values=field.padding))
        return np.concatenate(filled)

    def of(self, key: str, array: Any) -> Any:
        """The part of one batch, of an array [N ...]."""
        keys = list(self.batches)
        first = sum(len(self.batches[k].tokens) for k in keys[: keys.index(key)])
        return array[first : first + len(self.batches[key].tokens)]

    def places(self, key: str, array: Any) -> Any:
        """The part of one batch, of an array [N T ...]."""
        length = self.batches[key].tokens.shape[1]
        return self.of(key, array)[:, -length:] if key in CONTINUED else self.of(key, array)[:, :length]


def run(fixture: Any) -> dict[str, Any]:
    """Every recorded value of a whole model."""
    model = Model(fixture)
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in fixture.arrays.items():
        file, _, inner = name.partition("/")
        parts.setdefault(file, {})[inner] = array
    pictures = _pictures(parts, fixture.processor)
    rows = Rows({**_texts(model, parts), **_batches(model, pictures)})
    seen = _forward(model, rows)
    found: dict[str, dict[str, Any]] = {file: {} for file in parts}
    for key in rows.batches:
        file, _, positions = key.partition("/")
        if positions:
            found[file][f"logits_{positions}_positions"] = rows.places(key, seen["logits"])
        elif file == TEXT:
            found[file] = _text(model, parts[file], rows, seen)
        else:
            found[file] = _pictured(parts[file], pictures[file], rows, seen, file)
    for file, values in _continued(model, rows, parts).items():
        found[file] |= values
    if "lm_cache" in parts:
        found["lm_cache"] = _cached(model, parts["lm_cache"])
    found |= {file: _training(model, part) for file, part in parts.items() if file.startswith("train_")}
    return {f"{file}/{name}": value for file, values in found.items() for name, value in values.items()}


def _pictures(files: Collection[str], processor: Any) -> dict[str, dict[str, np.ndarray]]:
    """What the published processor gave for the sequences with pictures, by file."""
    found = {}
    for file, name in (PROMPTS | BATCHES).items():
        if file in files:
            with np.load(processor / ("cases" if file in PROMPTS else "") / f"{name}.npz") as case:
                found[file] = {n: case[n][None] if file in PROMPTS else case[n] for n in case.files}
    return found


def _batches(model: Model, pictures: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Batch]:
    """The sequences with pictures; places of visual tokens depend on the number of tiles, so all have one."""
    most = max((inputs["images"].shape[1] for inputs in pictures.values()), default=0)
    return {file: model.batch(inputs, most) for file, inputs in pictures.items()}


def _texts(model: Model, parts: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Batch]:
    """The sequences without: whole, and padded before their first token, with two kinds of positions."""
    batches = {TEXT: model.text(parts[TEXT]["input_ids"])}
    if padded := parts.get("lm_leftpad"):
        for name, positions in (("explicit", padded["position_ids"]), ("default", None)):
            batch = model.text(padded["input_ids"], padded["attention_mask"], positions)
            batches[f"lm_leftpad/{name}"] = batch
    return batches


def _forward(model: Model, rows: Rows) -> dict[str, Any]:
    """What one pass over all rows shows: its ends, the tiles, and the layers' states of the text, by path."""

    def shown(_: Any, method: str) -> bool:
        return method in ("__call__", "project", "embed")

    def of_text(path: str, value: Any) -> Any:
        """Of an array [L N ...]."""
        if path.endswith("weights"):  # ... heads T T
            length = rows.batches[TEXT].tokens.shape[1]
            return jax.vmap(lambda a: rows.of(TEXT, a)[..., :length, :length])(value)
        return jax.vmap(lambda a: rows.places(TEXT, a))(value)

    @jax.jit
    def run(params: Any, batch: Batch) -> dict[str, Any]:
        def whole(network: VisionLanguage) -> tuple:
            hidden = network(batch, model.state).hidden
            return hidden, network.logits(hidden)

        (hidden, logits), captured = model.network.apply(
            {"params": params}, method=whole, mutable=["intermediates"], capture_intermediates=shown
        )  # pyright: ignore
        flat = {path: first_of(v) for path, v in params_lib.flatten(captured["intermediates"]).items()}
        layers = [f"{r.name}/{path}" for r in model.config.language.runs for path in LAYER]
        return {
            "hidden": hidden,
            "logits": logits,
            "inputs_embeds": flat["embed"],
            "vision_features": flat["encoder/__call__"].tokens,
            "projector_out": flat["adapter/project"],
            **{path: of_text(path, flat[f"language/{path}"]) for path in layers},
        }

    return jax.device_get(run(model.params, rows.batch))


def _text(
    model: Model, recorded: Mapping[str, np.ndarray], rows: Rows, seen: Mapping[str, Any]
) -> dict[str, Any]:
    """The states between layers, and what sparse layers make of the recorded inputs of theirs."""
    tokens, config = recorded["input_ids"], model.config.language
    place = {n: (r.name, i) for r in config.runs for i, n in enumerate(r.layers)}

    def of(layer: int, path: str) -> np.ndarray:
        name, index = place[layer]
        return seen[f"{name}/{path}"][index]

    hidden, logits = (rows.places(TEXT, seen[name]) for name in ("hidden", "logits"))
    embedded = np.asarray(model.params["language"]["embedding"])[tokens]
    states = [embedded, *(of(i, "__call__") for i in range(config.num_layers - 1)), hidden]
    found = {f"hidden_{i}": state for i, state in enumerate(states)}
    found |= {"logits": logits, "loss_ce": cross_entropy(logits, tokens)}
    found["attn_layer0"] = of(0, "attention/weights")
    experts = _experts(model, recorded)
    for layer in config.sparse_layers:
        found[f"gate{layer}_in"] = of(layer, "mlp_norm/__call__")
        assignment, found[f"moe{layer}_out"] = experts[layer]
        top_k = assignment.experts.shape[-1]
        chosen, gates = (a.reshape(-1, top_k) for a in (assignment.experts, assignment.gates))
        order = np.argsort(chosen, axis=1)
        found[f"gate{layer}_topk_idx_sorted"] = np.take_along_axis(chosen, order, axis=1)
        found[f"gate{layer}_topk_weight_sorted"] = np.take_along_axis(gates, order, axis=1)
    return found


def _experts(
    model: Model, recorded: Mapping[str, np.ndarray]
) -> dict[int, tuple[routing.TokenChoice, np.ndarray]]:
    """Assignment and output of every sparse layer for the recorded input."""

    @jax.jit
    def run(params: Any, state: Any, x: jax.Array) -> tuple:
        (y, _), captured = DynamicMoE(model.config.moe).apply(
            {"params": params}, x, routed_everywhere(x.shape[:2]), state, mutable=["intermediates"]
        )  # pyright: ignore
        return captured["intermediates"]["assignment"][0], y

    host, found, sparse = jax.device_get((model.params["language"], model.state[LANGUAGE])), {}, 0
    for layers in model.config.language.runs:
        for i, layer in enumerate(layers.layers if layers.sparse else ()):
            params = jax.tree.map(lambda a, i=i: a[i], host[0][layers.name]["moe"])
            state = jax.tree.map(lambda a, i=sparse: a[i], host[1])
            found[layer] = jax.device_get(run(params, state, recorded[f"gate{layer}_in"]))
            sparse += 1
    return found


def _pictured(
    recorded: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
    rows: Rows,
    seen: Mapping[str, Any],
    file: str,
) -> dict[str, Any]:
    """What a pass shows of sequences with pictures."""
    tiles, count = rows.batch.tiles.shape[1], inputs["images"].shape[1]
    found = {}
    for name in ("vision_features", "projector_out"):
        by_row = seen[name].reshape(-1, tiles, *seen[name].shape[1:])
        found[name] = rows.of(file, by_row)[0, :count]
    logits = rows.places(file, seen["logits"])
    found |= {
        "inputs_embeds": rows.places(file, seen["inputs_embeds"]),
        "position_ids": rows.batches[file].positions,
        "logits": logits[:, -recorded["logits"].shape[1] :] if "logits" in recorded else logits,
        "logits_last": logits[:, -1],
    }
    if (labels := inputs.get("labels")) is not None:
        found |= {"loss": cross_entropy(logits, labels), "n_target": (labels[:, 1:] != -100).sum()}
    return found


def _continued(
    model: Model, rows: Rows, parts: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, dict[str, Any]]:
    """Greedy ids after every prompt, and the logits of the first of them where it is read in pieces."""
    counts = {file: parts[file]["greedy_ids"].shape[1] for file in rows.batches if file in CONTINUED}
    if not counts:
        return {}
    rows = Rows({file: rows.batches[file] for file in counts})
    config = GenerationConfig(max_new_tokens=max(counts.values()))
    options: dict[str, Any] = {"model": model.network, "slots": rows.batch.tokens.shape[1], "chunk": CHUNK}
    ids = generate(model.params, model.state, rows.batch, model=model.network, config=config, stop=(-1,))
    last = jax.jit(lambda params, batch: prefill(params, model.state, batch, **options)[0])(
        model.params, rows.batch
    )
    ids, last = jax.device_get((ids, last))
    return {
        file: {
            "greedy_ids": rows.of(file, ids)[:, :count],
            "last_logits_chunked_prefill": rows.of(file, last),
        }
        for file, count in counts.items()
    }


def _cached(model: Model, recorded: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Logits of tokens over the cache: of the first few at once, of each that follows by itself."""
    tokens, filled = recorded["input_ids"].astype(np.int32), int(recorded["prefill_len"])
    rows, slots = tokens.shape

    @jax.jit
    def run(params: Any, batch: Batch, following: jax.Array) -> tuple:
        def whole(network: VisionLanguage) -> tuple:
            cache = model.config.init_cache(batch=rows, slots=slots)
            output = network(batch, model.state, cache=cache)
            return network.logits(output.hidden), output.cache

        def step(cache: Any, new: tuple) -> tuple[Any, jax.Array]:
            one, cache = decode(params, model.state, batch, vision, *new, cache, model=model.network)
            return cache, one

        vision = jnp.zeros((rows, 2, model.config.language.embed_dim))
        logits, cache = model.network.apply({"params": params}, method=whole)  # pyright: ignore
        after, steps = jax.lax.scan(step, cache, (following, jnp.arange(len(following))))
        kept, final = (jax.tree.map(lambda a: a[0], c.runs[0]) for c in (cache, after))
        return jnp.concatenate([logits, steps.swapaxes(0, 1)], axis=1), kept, final

    logits, kept, final = jax.device_get(run(model.params, model.text(tokens[:, :filled]), tokens.T[filled:]))
    found = {f"cache_layer0_{n}_after_prefill": v[:, :, :filled] for n, v in _names(kept).items()}
    found |= {f"cache_layer0_{n}_final": v for n, v in _names(final).items()}
    return {**found, "logits_incremental": logits}


def _names(kept: tuple[np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    """One layer's cache in the recorded form [B heads S width]."""
    if kept[0].ndim == 3:  # latent, shared key
        latent, key = (a[:, None] for a in kept)
        return {"k": key, "v": latent}
    return {"k": kept[0].swapaxes(1, 2), "v": kept[1].swapaxes(1, 2)}


def _training(model: Model, recorded: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Loss, auxiliary losses and gradients, with the recorded weight and scope of the auxiliary loss."""
    scope = "sequence" if recorded["seq_aux"] else "batch"
    balance = dataclasses.replace(model.config.moe.balance, weight=float(recorded["alpha"]), scope=scope)
    moe = dataclasses.replace(model.config.moe, balance=balance)
    network = VisionLanguage(dataclasses.replace(model.config, moe=moe))
    batch = jax.tree.map(jnp.asarray, model.text(recorded["input_ids"]))

    def loss(language: Any, others: Any) -> tuple[jax.Array, tuple]:
        def whole(network: VisionLanguage) -> tuple:
            output = network(batch, model.state, seen=vision)
            return network.logits(output.hidden), output.routed.get(LANGUAGE)

        vision = jnp.zeros((*batch.visual_index.shape, model.config.language.embed_dim))
        params = {**others, "language": language}
        logits, routed = network.apply({"params": params}, method=whole)  # pyright: ignore
        entropy = cross_entropy(logits, batch.tokens)
        balance = routed.losses["balance"]
        return entropy + jnp.sum(balance), (entropy, balance)

    # A text depends on no encoder: only the language model is differentiated, which halves the program.
    others = {name: tree for name, tree in model.params.items() if name != "language"}
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, (entropy, balance)), gradient = jax.device_get(step(model.params["language"], others))
    found = {"loss_ce": entropy}
    layers = model.config.language.sparse_layers
    found |= {f"aux_loss_layer{n}": value for n, value in zip(layers, balance, strict=True)}
    tree = {**jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), others), "language": gradient}
    return found | {f"grad:{key}": array for key, array in rules.export(model.plan(tree), tree)}
