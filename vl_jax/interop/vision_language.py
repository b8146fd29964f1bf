"""LLaVA and DeepSeek-VL checkpoints: the published config as ours, and where each tensor goes.

They put published parts together: an image encoder (``vision``), a high-resolution branch (``conv``), a
projector, and a language model (``language``). All tensors are parameters, those of encoder layers and heads
that no feature comes from too, so a checkpoint goes out as it came in.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl_jax.data.published.picture_text import HIGH, LOW, Format, PictureTextProcessor
from vl_jax.encoders.adapter import AdapterConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.interop import vision
from vl_jax.interop.conv import aligner_rules, high_resolution_rules, read_high_resolution, sam_stacks
from vl_jax.interop.language import (
    NAMES,
    LanguageConfig,
    Names,
    language_rules,
    language_stacks,
    read_language,
)
from vl_jax.interop.rules import Rule
from vl_jax.kernels.activation import FUNCTIONS, Kind
from vl_jax.model import VisionLanguageConfig

Fields = Mapping[str, Any]

# Tensors of older checkpoints that are no parameters: tables of numbers that follow from the config.
IGNORED = (*vision.IGNORED, r"(.*\.)?rotary_emb\.inv_freq")

_CONTEXT = 2048  # tokens, of a language model whose config does not say
_LLAVA = {
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "tie_word_embeddings": False,
}
# The encoder of a LLaVA config that says nothing about it: CLIP-ViT-L/14-336.
_LLAVA_ENCODER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@dataclass(frozen=True)
class PictureFamily:
    """Models that share a config class, and how their tensors are called."""

    read: Callable[[Fields], VisionLanguageConfig]
    encoder: str  # the model type of an encoder that does not say its own
    # What comes before the names of each part, unless the checkpoint's own keys tell.
    vision: str
    language: str
    head: str
    projector: str
    layers: tuple[str, ...]  # of the projector; none: there is an aligner of two encoders
    chat: Format
    image_token: int  # the id of a picture's mark, if a config does not say


def read_vision_language(config: Fields) -> VisionLanguageConfig:
    """Our configuration of a published model.

    Raises:
      ValueError: the model type is not known, or an option is not supported.
    """
    return _family(config).read(config)


def vision_language_rules(config: Fields, keys: Iterable[str] = ()) -> tuple[Rule, ...]:
    """Where the tensors of a published model go.

    Args:
      config: as published.
      keys: the names of the tensors, of which several generations are about. Without them, those that
        checkpoints have now.

    Raises:
      ValueError: see ``read_vision_language``; or a part is found more than once among the keys.
    """
    family, keys = _family(config), tuple(keys)
    text, encoder = _text(config), _encoder(config)
    names = NAMES.get(text["model_type"], Names())
    names = dataclasses.replace(
        names,
        base=_before("embed_tokens.weight", keys, family.language),
        head=_before("lm_head.weight", keys, family.head) + "lm_head.weight",
    )
    table = vision.TABLES[encoder["model_type"]]
    return (
        *table.rules(_before(table.outer[0][0], keys, family.vision), "encoder/"),
        *_projector_rules(family, keys),
        *language_rules(read_vision_language(config).language, names),
    )


def vision_language_stacks(config: VisionLanguageConfig) -> dict[str, tuple[int, ...]]:
    """The layers each stack of parameters or state holds, for ``rules.plan``."""
    high = config.high_resolution
    of_decoder = {run.name: run.layers for run in config.language.runs_with(config.moe)}
    return {**language_stacks(config.language), **of_decoder, **(sam_stacks(high.encoder) if high else {})}


def _family(config: Fields) -> PictureFamily:
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type={kind!r}: known are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]


def _text(config: Fields) -> Fields:
    return {"model_type": "llama", **(config.get("text_config") or {})}


def _encoder(config: Fields) -> Fields:
    return {"model_type": _family(config).encoder, **(config.get("vision_config") or {})}


def load_processor(folder: Path, config: Fields, model: VisionLanguageConfig) -> PictureTextProcessor | None:
    """The processor in a checkpoint's folder; None if it has none.

    Raises:
      ValueError: a file is missing or malformed, or does not go with the model.
    """
    if not (folder / "preprocessor_config.json").is_file():
        return None
    assert model.encoder is not None
    family, high = FAMILIES[config["model_type"]], model.high_resolution
    names = [name for name in ("image_token_id", "image_token_index") if config.get(name) is not None]
    side = None if high is None else high.encoder.image_size
    return PictureTextProcessor.load(
        folder,
        format=family.chat,
        image_token=config[names[0]] if names else family.image_token,
        image_tokens=model.tile_tokens,
        shapes={LOW: model.encoder.input_shape, **({} if side is None else {HIGH: (side, side, 3)})},
        max_tokens=_text(config).get("max_position_embeddings") or _CONTEXT,
    )


def _before(name: str, keys: Iterable[str], default: str) -> str:
    """What comes before the only key that ends with a name, outside numbered layers."""
    found = [key.removesuffix(name) for key in keys if key == name or key.endswith(f".{name}")]
    found = [before for before in found if not re.search(r"(^|\.)\d+\.", before)]
    if len(found) > 1:
        raise ValueError(f"{len(found)} tensors are called {name!r}; expected one")
    return found[0] if found else default


def _projector_rules(family: PictureFamily, keys: Iterable[str]) -> tuple[Rule, ...]:
    if not family.layers:
        root = _before("aligner.proj.weight", keys, family.projector)
        return (*high_resolution_rules(root), *aligner_rules(root + "aligner."))
    root = _before(f"{family.layers[0]}.weight", keys, family.projector)
    return tuple(
        rule
        for i, name in enumerate(family.layers)
        for rule in (
            Rule(f"{root}{name}.weight", f"adapter/layer_{i}/kernel", "f d -> d f"),
            Rule(f"{root}{name}.bias", f"adapter/layer_{i}/bias", "f -> f"),
        )
    )


def _read_deepseek_vl(c: Fields) -> VisionLanguageConfig:
    language = _language(c, tied=c.get("tie_word_embeddings"))
    return VisionLanguageConfig(
        encoder=_all_tokens(vision.read_vision(_encoder(c))),
        adapter=AdapterConfig(downsample=1, separators=False),
        language=language.decoder,
        moe=language.moe,
    )


def _read_deepseek_vl_hybrid(c: Fields) -> VisionLanguageConfig:
    # The aligner is the projector: there is none after it.
    adapter = AdapterConfig(downsample=1, num_layers=0, separators=False)
    return dataclasses.replace(_read_deepseek_vl(c), adapter=adapter, high_resolution=read_high_resolution(c))


def _read_llava(config: Fields) -> VisionLanguageConfig:
    c = {**_LLAVA, **config}
    encoder = {**({} if c.get("vision_config") is not None else _LLAVA_ENCODER), **_encoder(c)}
    layers, strategy = c["vision_feature_layer"], c["vision_feature_select_strategy"]
    if strategy not in ("default", "full"):
        raise ValueError(f"vision_feature_select_strategy={strategy!r}: known are default, full")
    language = _language(c, tied=c["tie_word_embeddings"] or None)
    return VisionLanguageConfig(
        encoder=dataclasses.replace(
            _all_tokens(vision.read_vision(encoder)),
            feature_layers=(layers,) if isinstance(layers, int) else tuple(layers),
        ),
        adapter=AdapterConfig(
            downsample=1,
            activation=_activation(c["projector_hidden_act"]),
            use_bias=c["multimodal_projector_bias"],
            skip=int(strategy == "default"),  # the first token, whether it is a class token or not
            separators=False,
        ),
        language=language.decoder,
        moe=language.moe,
    )


def _activation(name: str) -> Kind:
    known: Any = {name: ours for name, ours in vision.ACTIVATIONS.items() if ours in FUNCTIONS}
    if name not in known:
        raise ValueError(f"projector_hidden_act={name!r}: known are {', '.join(known)}")
    return known[name]


def _all_tokens(encoder: ViTConfig) -> ViTConfig:
    return dataclasses.replace(encoder, class_feature=encoder.class_token)


def _language(c: Fields, *, tied: bool | None) -> LanguageConfig:
    """The language model. ``tied``: its head is the embedding table; None: if its own config says so."""
    language = read_language(_text(c))
    tied = language.decoder.tie_embeddings if tied is None else tied
    return dataclasses.replace(language, decoder=dataclasses.replace(language.decoder, tie_embeddings=tied))


_DEEPSEEK_VL_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
_DEEPSEEK_VL = PictureFamily(
    _read_deepseek_vl,
    encoder="siglip_vision_model",
    vision="model.vision_model.",
    language="model.language_model.",
    head="",
    projector="model.",
    layers=("aligner.linear1", "aligner.linear2"),
    chat=Format(_DEEPSEEK_VL_SYSTEM, "\n\n", "User:", "Assistant:", "\n\n", "{eos}"),
    image_token=100015,
)
FAMILIES = {
    "deepseek_vl": _DEEPSEEK_VL,
    "deepseek_vl_hybrid": dataclasses.replace(_DEEPSEEK_VL, read=_read_deepseek_vl_hybrid, layers=()),
    "llava": PictureFamily(
        _read_llava,
        encoder="clip_vision_model",
        vision="vision_tower.",
        language="language_model.model.",
        head="language_model.",
        projector="",
        layers=("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
        chat=Format("", " ", "USER:", "ASSISTANT:", " ", "{eos}"),
        image_token=32000,
    ),
}
