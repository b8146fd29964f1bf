"""Runs published image encoders with convolutions on recorded inputs, for every value that was recorded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vl_jax import params as params_lib
from vl_jax.encoders.resnet import ResNet
from vl_jax.encoders.sam import SAM, SAMConfig
from vl_jax.interop import conv, rules

Found = dict[str, Any]


def channels_last(x: Any) -> jax.Array:
    return jnp.asarray(np.moveaxis(np.asarray(x), 1, -1))


def channels_first(x: Any) -> Any:
    return (np if isinstance(x, np.ndarray) else jnp).moveaxis(x, -1, 1)


def shown(module: nn.Module, method: str) -> bool:
    """Whether what a method gives is captured: that of calls, and the grids inside an encoder."""
    return method in ("__call__", "stages")


class Loaded:
    """A module with the weights of a fixture, whose collections are the top of the tree of the rules."""

    def __init__(
        self,
        module: nn.Module,
        table: Sequence[rules.Rule],
        weights: Mapping[str, np.ndarray],
        pixels: jax.Array,
        *,
        stacks: Mapping[str, Sequence[int | str]] | None = None,
        ignored: Sequence[str] = (),
        method: str = "stages",
    ):
        self.module, self.table, self.stacks, self.pixels = module, table, stacks, pixels
        self.method = method
        boxed = jax.eval_shape(lambda: module.init(jax.random.key(0), pixels))
        targets = nn.meta.unbox(boxed)
        self.variables = rules.read(self.plan(targets), weights, targets, ignored=ignored)

    def plan(self, tree: Any) -> rules.Plan:
        shapes = {path: tuple(leaf.shape) for path, leaf in params_lib.flatten(tree).items()}
        return rules.plan(self.table, shapes, self.stacks)

    def show(
        self, main: Callable[[Any], jax.Array], cotangent: np.ndarray
    ) -> tuple[Any, dict[str, Any], Found]:
        """The output; what was seen on the way, by path; the objective and its gradient. One program.

        The objective is the sum of the main output times the cotangent; every tensor of parameters has a
        gradient.
        """
        frozen = {name: tree for name, tree in self.variables.items() if name != "params"}

        def value(params: Any) -> tuple[jax.Array, Any]:
            output, captured = self.module.apply(
                {**frozen, "params": params},
                self.pixels,
                method=self.method,
                capture_intermediates=True,
                mutable=["intermediates"],
            )
            return jnp.sum(main(output) * cotangent), (output, captured["intermediates"])

        run = jax.jit(jax.grad(value, has_aux=True))
        gradient, (output, captured) = jax.device_get(run(self.variables["params"]))
        # A thousand terms of either sign: in float32 their sum would lose more than the recording allows.
        total = np.sum(np.asarray(main(output), np.float64) * cotangent)
        tree = {"params": gradient}
        exported = {f"grad/{key}": array for key, array in rules.export(self.plan(tree), tree)}
        flat = params_lib.flatten(captured)
        seen = {path.removesuffix("/__call__"): value for path, value in flat.items()}
        return output, seen, {"out_objective": total, **exported}


def run(fixture: Any) -> Found:
    """Every recorded value of an image encoder."""
    return {"SamVisionModel": sam, "ResNetModel": resnet}[fixture.model_class](fixture)


def sam(fixture: Any) -> Found:
    config = conv.read_sam(fixture.config)
    model = Loaded(
        SAM(config),
        conv.sam_rules(target="params/"),
        fixture.weights,
        channels_last(fixture.arrays["in_pixel_values"]),
        stacks=conv.sam_stacks(config),
    )
    output, captured, found = model.show(
        lambda out: channels_first(out.features), fixture.arrays["in_cotangent"]
    )
    found["out_last_hidden_state"] = channels_first(output.features)
    cells = captured["stem"][0]
    found["out_hidden_states.0"] = cells + np.asarray(
        model.variables["params"].get("positions", np.float32(0))
    )
    for i in range(config.num_layers):
        layer = sam_layer(config, captured, i)
        found[f"out_hidden_states.{i + 1}"] = layer[""]
        found[f"out_attentions.{i}"] = layer["attn.1"]
    return found | sam_modules(config, fixture.arrays, captured, "mid/vision_encoder.")


def sam_modules(config: SAMConfig, names: Sequence[str], captured: Mapping[str, Any], prefix: str) -> Found:
    """The recorded outputs of the encoder's modules."""
    found: Found = {
        f"{prefix}patch_embed": captured["stem"][0],
        f"{prefix}neck": channels_first(captured["neck"][0]),
    }
    for name in names:
        if match := re.fullmatch(re.escape(prefix) + r"layers\.(\d+)\.?(.*)", name):
            found[name] = sam_layer(config, captured, int(match[1])).get(match[2])
    return {name: value for name, value in found.items() if value is not None}


SAM_LAYER = {
    "": "",
    "layer_norm1": "/norm1",
    "layer_norm2": "/norm2",
    "attn.0": "/attention",
    "attn.1": "/attention/weights",
    "attn.proj": "/attention/project",
    "mlp": "/mlp",
}


def sam_layer(config: SAMConfig, captured: Mapping[str, Any], number: int) -> Found:
    """What one layer showed, by the names of the recorded modules."""
    stack = next(r for r in config.runs if number in r.layers)
    place = stack.layers.index(number)
    found: Found = {}
    for theirs, ours in SAM_LAYER.items():
        value = captured[stack.name + ours][0]
        value = (value[0] if isinstance(value, tuple) else value)[place]
        # The recorded probabilities merge windows and heads.
        found[theirs] = value.reshape(-1, *value.shape[-2:]) if theirs == "attn.1" else value
    return found


def resnet(fixture: Any) -> Found:
    config = conv.read_resnet(fixture.config)
    model = Loaded(
        ResNet(config),
        conv.resnet_rules(config),
        fixture.weights,
        channels_last(fixture.arrays["in_pixel_values"]),
        ignored=conv.RESNET_IGNORED,
    )
    output, captured, found = model.show(
        lambda out: out.pooled[:, :, None, None], fixture.arrays["in_cotangent"]
    )
    found |= {f"out_hidden_states.{i}": channels_first(stage) for i, stage in enumerate(output.stages)}
    found["out_last_hidden_state"] = channels_first(output.stages[-1])
    found["out_pooler_output"] = output.pooled[:, :, None, None]
    found["mid/embedder"] = found["out_hidden_states.0"]
    for i, blocks in enumerate(config.stage_blocks):
        seen = [captured[f"stage{i}_first"][0][0]]
        if blocks > 1:
            seen += list(captured[f"stage{i}_others"][0][0])
        for j, value in enumerate(seen):
            found[f"mid/encoder.stages.{i}.layers.{j}"] = channels_first(value)
    return found
