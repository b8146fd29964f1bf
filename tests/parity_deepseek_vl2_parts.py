"""Runs the vision encoder, the projector and the rotary embedding of DeepSeek-VL2, each by itself."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from parity_language import first_of

from vl_jax import params as params_lib
from vl_jax.encoders.adapter import Adapter
from vl_jax.encoders.vit import ViT
from vl_jax.interop import rules
from vl_jax.interop.deepseek_vl2 import projector_rules, read_projector
from vl_jax.interop.language import read_rope
from vl_jax.interop.vision import IGNORED, read_vision, vision_rules
from vl_jax.nn import rope


def run_vision(fixture: Any) -> dict[str, Any]:
    """Every recorded value of the vision encoder."""
    config = read_vision(fixture.config)
    encoder, pixels = ViT(config), jnp.moveaxis(jnp.asarray(fixture.arrays["io/images"]), 1, -1)
    shapes = jax.eval_shape(lambda: encoder.init(jax.random.key(0), pixels)["params"])
    params = _read(vision_rules("vision", source="vision."), fixture.weights, _unboxed(shapes))
    run = functools.partial(encoder.apply, mutable=["intermediates"], capture_intermediates=True)
    encoded, captured = jax.device_get(jax.jit(run)({"params": params}, pixels))
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
        found[f"{case}/y"] = jax.jit(functools.partial(adapter.apply, method="project"))(variables, x)
    return found


def run_rope(fixture: Any) -> dict[str, Any]:
    """Tables and rotated queries and keys of every recorded rotary embedding."""

    def table(case: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        config = read_rope({"rope_theta": settings["base"], **settings}, pairs="adjacent")
        dim, given = settings["dim"], {n: fixture.arrays[f"rope/{case}_{n}"] for n in ROPE_INPUTS}
        found: dict[str, Any] = {"inv_freq": rope.frequencies(config, dim)}
        angle = rope.angles(jnp.arange(len(given["cos"]))[None], dim=dim, config=config)[0]
        for name, function in (("cos", jnp.cos), ("sin", jnp.sin)):
            half = function(angle) * config.amplitude
            found[name] = jnp.concatenate([half, half], axis=-1)
        angle = rope.angles(jnp.asarray(given["positions"]), dim=dim, config=config)
        for name in ("q", "k"):
            x = jnp.asarray(given[f"{name}_in"]).swapaxes(1, 2)
            found[f"{name}_out"] = rope.rotate(x, angle, config).swapaxes(1, 2)
        return {f"rope/{case}_{name}": value for name, value in found.items()}

    def every() -> dict[str, Any]:
        return {n: v for case, settings in fixture.config.items() for n, v in table(case, settings).items()}

    return jax.jit(every)()


ROPE_INPUTS = ("cos", "positions", "q_in", "k_in")


def _read(table: Any, weights: Any, shapes: Any) -> Any:
    sizes = {path: tuple(leaf.shape) for path, leaf in params_lib.flatten(shapes).items()}
    return rules.read(rules.plan(table, sizes), weights, shapes, ignored=(*IGNORED, r"(?!vision\.).*"))


def _unboxed(tree: Any) -> Any:
    return jax.tree.map(lambda b: b.value, tree, is_leaf=lambda b: hasattr(b, "value"))
