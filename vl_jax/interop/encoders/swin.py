"""Published Swin transformers: their configs as ours, and where each of their tensors goes.

Two layouts of names: that of the Hugging Face hub, ``config.json`` with ``model_type`` "swin", and that of
torchvision, whose folder says ``"architecture": "swin_t"`` or another of its names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vl_jax.encoders.shifted import stacks_of
from vl_jax.encoders.swin import SwinConfig
from vl_jax.interop.conv import ACTIVATIONS
from vl_jax.interop.rules import STACK, Rule

Fields = Mapping[str, Any]

# Numbers that follow from the size of a window, and the classifier behind the encoder.
IGNORED = (r".*\.relative_position_index", r"(classifier|head)\.(weight|bias)")

_DEFAULTS = {
    "image_size": 224,
    "patch_size": 4,
    "num_channels": 3,
    "embed_dim": 96,
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "window_size": 7,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "use_absolute_embeddings": False,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
}
# torchvision 0.25, models/swin_transformer.py.
TORCHVISION = {
    "swin_t": SwinConfig(),
    "swin_s": SwinConfig(stage_blocks=(2, 2, 18, 2)),
    "swin_b": SwinConfig(embed_dim=128, stage_blocks=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}


def read_swin(config: Fields) -> SwinConfig:
    """Our configuration of a published Swin transformer.

    Raises:
      ValueError: an option is not supported.
    """
    if config.get("architecture") in TORCHVISION:
        return TORCHVISION[config["architecture"]]
    c = {**_DEFAULTS, **config}
    if c["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"hidden_act={c['hidden_act']!r}: known are {', '.join(ACTIVATIONS)}")
    patch = c["patch_size"]
    if isinstance(patch, (list, tuple)):
        if len(set(patch)) != 1:
            raise ValueError(f"patch_size={patch}: patches must be square")
        patch = patch[0]
    size, levels = c["image_size"], {} if c["num_channels"] == 3 else {"pixel_mean": 0.5, "pixel_std": 0.5}
    return SwinConfig(
        image_size=tuple(size) if isinstance(size, (list, tuple)) else size,
        patch_size=patch,
        num_channels=c["num_channels"],
        embed_dim=c["embed_dim"],
        stage_blocks=tuple(c["depths"]),
        num_heads=tuple(c["num_heads"]),
        window=c["window_size"],
        mlp_ratio=c["mlp_ratio"],
        qkv_bias=c["qkv_bias"],
        absolute_positions=c["use_absolute_embeddings"],
        activation=ACTIVATIONS[c["hidden_act"]],  # pyright: ignore[reportArgumentType]
        norm_epsilon=c["layer_norm_eps"],
        **levels,
    )


@dataclasses.dataclass(frozen=True)
class SwinNames:
    """The names of one layout."""

    stem: str
    stem_norm: str
    positions: str
    block: Callable[[int, int], str]  # of a stage, and of a block in it
    merge: Callable[[int], str]  # of a stage
    norm: str
    qkv: tuple[str, str, tuple[str, ...]]  # name in a block, axes of its outputs, parts
    norms: tuple[str, str]
    offsets: str
    linear: tuple[str, str, str]  # the projection of attention, and the two of the feed-forward part

    def stacks(self, config: SwinConfig) -> dict[str, tuple[str, ...]]:
        """The blocks that each stack of parameters holds, for ``rules.plan``."""
        return {
            f"stage{stage}/{name}": tuple(self.block(stage, number) for number in numbers)
            for stage, blocks in enumerate(config.stage_blocks)
            for name, numbers in stacks_of(blocks).items()
        }

    def rules(self, config: SwinConfig, source: str = "", target: str = "") -> tuple[Rule, ...]:
        """Where the tensors go; rules of absent parameters do not apply. The stacks are those of ``stacks``.

        Args:
          source: comes before every name in the checkpoint.
          target: comes before every path of ours.
        """
        inner = "layer part" if self.qkv[2] else "layer"
        name, axes, parts = self.qkv
        block = [
            (f"{name}.weight", "attention/qkv", f"{inner} {axes} d -> layer d part n h", parts),
            (f"{name}.bias", "attention/qkv_bias", f"{inner} {axes} -> layer part n h", parts),
            (self.offsets, "attention/offsets", "layer (y x) n -> layer y x n", ()),
        ]
        for theirs, ours in zip(self.norms, ("norm1", "norm2"), strict=True):
            block += [(f"{theirs}.{a}", f"{ours}/{b}", "layer d -> layer d", ()) for a, b in _NORM]
        for theirs, ours in zip(self.linear, ("attention/project", "fc1", "fc2"), strict=True):
            block.append((f"{theirs}.weight", f"{ours}/kernel", "layer o i -> layer i o", ()))
            block.append((f"{theirs}.bias", f"{ours}/bias", "layer o -> layer o", ()))
        merges = [
            Rule(f"{source}{theirs}.{a}", f"{target}{ours}/{b}", axes)
            for stage in range(len(config.stage_blocks) - 1)
            for theirs, ours in ((self.merge(stage), f"stage{stage}/merge"),)
            for a, b, axes in (
                ("norm.weight", "norm/scale", "d -> d"),
                ("norm.bias", "norm/bias", "d -> d"),
                ("reduction.weight", "reduce/kernel", "o i -> i o"),
            )
        ]
        return (
            Rule(f"{source}{self.stem}.weight", f"{target}stem/kernel", "o i p q -> p q i o"),
            Rule(f"{source}{self.stem}.bias", f"{target}stem/bias", "d -> d"),
            *(
                Rule(f"{source}{theirs}.{a}", f"{target}{ours}/{b}", "d -> d")
                for theirs, ours in ((self.stem_norm, "stem_norm"), (self.norm, "norm"))
                for a, b in _NORM
            ),
            Rule(f"{source}{self.positions}", f"{target}positions", "1 (u v) d -> u v d"),
            *merges,
            *(Rule(f"{source}{{layer}}.{n}", f"{target}{STACK}/{p}", a, parts) for n, p, a, parts in block),
        )


_NORM = (("weight", "scale"), ("bias", "bias"))
HUB = SwinNames(
    stem="embeddings.patch_embeddings.projection",
    stem_norm="embeddings.norm",
    positions="embeddings.position_embeddings",
    block=lambda stage, number: f"encoder.layers.{stage}.blocks.{number}",
    merge=lambda stage: f"encoder.layers.{stage}.downsample",
    norm="layernorm",
    qkv=("attention.self.{part}", "(n h)", ("query", "key", "value")),
    norms=("layernorm_before", "layernorm_after"),
    offsets="attention.self.relative_position_bias_table",
    linear=("attention.output.dense", "intermediate.dense", "output.dense"),
)
VISION = SwinNames(
    stem="features.0.0",
    stem_norm="features.0.2",
    positions="absolute_pos_embed",  # which none of them has
    block=lambda stage, number: f"features.{2 * stage + 1}.{number}",
    merge=lambda stage: f"features.{2 * stage + 2}",
    norm="norm",
    qkv=("attn.qkv", "(part n h)", ()),
    norms=("norm1", "norm2"),
    offsets="attn.relative_position_bias_table",
    linear=("attn.proj", "mlp.0", "mlp.3"),
)


def names_of(config: Fields) -> SwinNames:
    """The layout of names of a published folder, by its config."""
    return VISION if config.get("architecture") in TORCHVISION else HUB
