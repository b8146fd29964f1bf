"""The published models that can be read: by ``model_type`` how config, tensors and processor become ours."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vl_jax.data.images.pixels import as_tiling, load_image_processor
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.published.picture_text import PictureTextProcessor
from vl_jax.data.published.processor import Processor
from vl_jax.data.published.text_processor import TextProcessor
from vl_jax.interop.deepseek_vl2 import deepseek_vl2_rules, read_deepseek_vl2
from vl_jax.interop.encoder_decoder import IGNORED as SWITCH_IGNORED
from vl_jax.interop.encoder_decoder import (
    encoder_decoder_rules,
    encoder_decoder_stacks,
    read_text_to_text,
)
from vl_jax.interop.encoders import sound
from vl_jax.interop.language import FAMILIES as TEXT_FAMILIES
from vl_jax.interop.language import NAMES, Names, language_rules, read_language
from vl_jax.interop.rules import Rule
from vl_jax.interop.vision import CONTRASTIVE, contrastive_rules, read_contrastive
from vl_jax.interop.vision_language import FAMILIES as VISION_LANGUAGE
from vl_jax.interop.vision_language import (
    load_processor,
    read_vision_language,
    vision_language_rules,
    vision_language_stacks,
)
from vl_jax.joint import JointConfig
from vl_jax.language.text_to_text import TextToTextConfig
from vl_jax.model import VisionLanguageConfig

_CONTEXT = 2048  # tokens, of a language model whose config does not say

Fields = Mapping[str, Any]
PublishedConfig = VisionLanguageConfig | JointConfig | TextToTextConfig
AnyProcessor = Processor | PictureTextProcessor | TextProcessor


@dataclass(frozen=True)
class Family:
    """How checkpoints that share a ``model_type`` are read."""

    config: Callable[[Fields], Any]  # a ``PublishedConfig``, which the others get
    rules: Callable[
        [Any, Fields, Collection[str]], tuple[Rule, ...]
    ]  # of the names of a checkpoint's tensors
    # What a folder holds, read for the model; None where there is none.
    processor: Callable[[Path, Fields, Any], AnyProcessor | None] = lambda *_: None
    # How pictures become tiles in training; None where the folder does not say.
    tiling: Callable[[Path, Any], TilingConfig | None] = lambda *_: None
    # The layers each stack of parameters or state holds, for ``rules.plan``, where it is not all in one.
    stacks: Callable[[Any], dict[str, tuple[int, ...]]] = vision_language_stacks
    ignored: tuple[str, ...] = ()  # regular expressions of further tensors that may go unused


def _language_config(fields: Fields) -> VisionLanguageConfig:
    language = read_language(fields)
    return VisionLanguageConfig(encoder=None, language=language.decoder, moe=language.moe)


def _language_rules(config: VisionLanguageConfig, fields: Fields, _: Collection[str]) -> tuple[Rule, ...]:
    return language_rules(config.language, NAMES.get(fields["model_type"], Names()))


def _language_processor(folder: Path, fields: Fields, _: VisionLanguageConfig) -> TextProcessor | None:
    return TextProcessor.load(folder, max_tokens=fields.get("max_position_embeddings") or _CONTEXT)


def _deepseek_vl2_processor(folder: Path, *_: Any) -> Processor | None:
    return Processor.load(folder) if (folder / "processor_config.json").is_file() else None


def _deepseek_vl2_tiling(folder: Path, _: VisionLanguageConfig) -> TilingConfig | None:
    processor = _deepseek_vl2_processor(folder)
    return None if processor is None else processor.config.tiling(processor.views)


def _contrastive_tiling(folder: Path, config: JointConfig) -> TilingConfig | None:
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return None
    (view,), (image, _) = load_image_processor(folder).views, config.towers
    levels = {name: np.broadcast_to(getattr(image.encoder, f"pixel_{name}"), 3) for name in ("mean", "std")}
    for name, ours in levels.items():
        if not np.array_equal(getattr(view, name), ours):
            raise ValueError(f"{file}: image_{name}={getattr(view, name)}: must be {tuple(ours.tolist())}")
    try:
        return as_tiling(view)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


FAMILIES: dict[str, Family] = {
    "deepseek_vl_v2": Family(
        read_deepseek_vl2,
        lambda config, *_: deepseek_vl2_rules(config),
        _deepseek_vl2_processor,
        _deepseek_vl2_tiling,
    ),
    **dict.fromkeys(TEXT_FAMILIES, Family(_language_config, _language_rules, _language_processor)),
    **dict.fromkeys(
        VISION_LANGUAGE,
        Family(
            read_vision_language,
            lambda _, fields, keys: vision_language_rules(fields, keys),
            load_processor,
        ),
    ),
    **dict.fromkeys(
        CONTRASTIVE,
        Family(
            read_contrastive,
            lambda _, fields, __: contrastive_rules(fields["model_type"]),
            tiling=_contrastive_tiling,
            stacks=lambda _: {},
        ),
    ),
    "switch_transformers": Family(
        read_text_to_text,
        lambda *_: encoder_decoder_rules(),
        stacks=lambda config: encoder_decoder_stacks(config.network),
        ignored=SWITCH_IGNORED,
    ),
    "wav2vec2": Family(
        sound.read_speech,
        lambda _, __, keys: sound.speech_rules(keys),
        stacks=lambda _: {},
        ignored=sound.IGNORED,
    ),
}
