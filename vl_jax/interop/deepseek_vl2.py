"""DeepSeek-VL2 checkpoints: the published config as ours, and where each tensor goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vl_jax.encoders.adapter import AdapterConfig
from vl_jax.interop.language import Names, language_rules, read_deepseek
from vl_jax.interop.rules import Rule
from vl_jax.interop.vision import read_vision, vision_rules
from vl_jax.model import VisionLanguageConfig

Fields = Mapping[str, Any]

# The defaults of the official classes, for what a published config leaves out.
_PROJECTOR = {
    "projector_type": "downsample_mlp_gelu",
    "n_embed": 2048,
    "depth": 2,
    "mlp_ratio": 1,
    "downsample_ratio": 2,
    "token_pooling": False,
}
_NAMES = Names(base="language.model.", head="language.lm_head.weight")


def read_deepseek_vl2(config: Fields) -> VisionLanguageConfig:
    """Our configuration of a published model.

    Raises:
      ValueError: an option is not supported, or projector and language model do not fit together.
    """
    language = read_deepseek(config.get("language_config") or {})
    projector = {**_PROJECTOR, **(config.get("projector_config") or {})}
    if config.get("tile_tag") != "2D":
        raise ValueError(f"tile_tag={config.get('tile_tag')!r}: only 2D is known")
    if projector["n_embed"] != language.decoder.embed_dim:
        raise ValueError(
            f"projector_config.n_embed={projector['n_embed']} must be language_config.hidden_size="
            f"{language.decoder.embed_dim}"
        )
    return VisionLanguageConfig(
        encoder=read_vision({**(config.get("vision_config") or {}), "model_type": "vision"}),
        adapter=read_projector(projector),
        language=language.decoder,
        moe=language.moe,
    )


def read_projector(config: Fields) -> AdapterConfig:
    """Our configuration of a published projector.

    Raises:
      ValueError: the type is not supported.
    """
    c = {**_PROJECTOR, **config}
    if c["token_pooling"]:
        raise ValueError("token_pooling=True: not supported, no published checkpoint has it")
    if c["projector_type"] == "identity":
        return AdapterConfig(downsample=1, num_layers=0)
    if c["projector_type"] == "linear":
        return AdapterConfig(downsample=1, num_layers=1)
    if c["projector_type"] == "mlp_gelu":
        return AdapterConfig(downsample=1, num_layers=c["depth"])
    if c["projector_type"] == "downsample_mlp_gelu":
        # The first and the last layer are always there.
        return AdapterConfig(c["downsample_ratio"], max(c["depth"], 2), c["mlp_ratio"])
    raise ValueError(
        f"projector_type={c['projector_type']!r}: known are identity, linear, mlp_gelu, downsample_mlp_gelu"
    )


def projector_rules(config: AdapterConfig) -> tuple[Rule, ...]:
    """Where the tensors of a projector go; a linear one is not numbered."""
    rules = []
    for i in range(config.num_layers):
        # A non-linearity without parameters stands between two layers, and counts.
        name = "projector.layers" if config.num_layers == 1 else f"projector.layers.{2 * i}"
        rules += [
            Rule(f"{name}.weight", f"adapter/layer_{i}/kernel", "f d -> d f"),
            Rule(f"{name}.bias", f"adapter/layer_{i}/bias", "f -> f"),
        ]
    return tuple(rules)


def deepseek_vl2_rules(config: VisionLanguageConfig) -> tuple[Rule, ...]:
    """Where the tensors of a published model go."""
    return (
        *vision_rules("vision", source="vision.", target="encoder/"),
        *projector_rules(config.adapter),
        Rule("image_newline", "adapter/newline", "d -> d"),
        Rule("view_seperator", "adapter/separator", "d -> d"),  # so spelt
        *language_rules(config.language, _NAMES),
    )
