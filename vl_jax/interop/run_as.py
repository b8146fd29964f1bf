"""A published model as an experiment runs and trains it: what stays of the experiment's own model."""

from __future__ import annotations

import dataclasses
from typing import Any

from vl_jax.heads.pairs import Pairs
from vl_jax.interop.families import PublishedConfig
from vl_jax.joint import JointConfig
from vl_jax.language.text_to_text import TextToTextConfig
from vl_jax.model import VisionLanguageConfig

# What is no property of a published model, but of how it is run and trained here: see ``run_as``.
MOE_SETTINGS = ("balance", "limit", "execution")


def run_as(published: PublishedConfig, ours: Any) -> PublishedConfig:
    """The published model, run and trained as ours is.

    Of ours stay compute dtype and rematerialisation, of a model that writes ``MOE_SETTINGS``, of a language
    model ``scan_layers``, of a joint model what tells pictures apart (``Pairs.identity``).

    Raises:
      ValueError: ours is a model of another class, or a joint model with other parts.
    """
    if isinstance(published, VisionLanguageConfig) and isinstance(ours, VisionLanguageConfig):
        return _run_vision_language(published, ours)
    if isinstance(published, JointConfig) and isinstance(ours, JointConfig):
        return _run_joint(published, ours)
    if isinstance(published, TextToTextConfig) and isinstance(ours, TextToTextConfig):
        return _run_text_to_text(published, ours)
    raise ValueError(
        f"config.init: a published {type(published).__name__} cannot begin a {type(ours).__name__}"
    )


def _run_joint(published: JointConfig, ours: JointConfig) -> JointConfig:
    theirs, mine = (
        {
            "towers": [(tower.name, tower.input) for tower in config.towers],
            "fusion": config.fusion,
            "heads": [(head.name, type(head).__name__) for head in config.heads],
        }
        for config in (published, ours)
    )
    for part, expected in theirs.items():
        if mine[part] != expected:
            raise ValueError(
                f"config.model.{part}: has {mine[part]}, the checkpoint of config.init {expected}"
            )
    heads = tuple(
        dataclasses.replace(head, identity=own.identity)
        if isinstance(head, Pairs) and isinstance(own, Pairs)
        else head
        for head, own in zip(published.heads, ours.heads, strict=True)
    )
    return dataclasses.replace(published, heads=heads, dtype=ours.dtype, remat=ours.remat)


def _run_vision_language(published: VisionLanguageConfig, ours: VisionLanguageConfig) -> VisionLanguageConfig:
    language = dataclasses.replace(
        published.language, remat=ours.language.remat, scan_layers=ours.language.scan_layers
    )
    settings = {name: getattr(ours.moe, name) for name in MOE_SETTINGS}
    moe = dataclasses.replace(published.moe, **settings)
    return dataclasses.replace(published, language=language, moe=moe, dtype=ours.dtype)


def _run_text_to_text(published: TextToTextConfig, ours: TextToTextConfig) -> TextToTextConfig:
    network = dataclasses.replace(published.network, remat=ours.network.remat)
    encoder, decoder = (
        dataclasses.replace(published.moe, **{name: getattr(moe, name) for name in MOE_SETTINGS})
        for moe in (ours.moe, ours.decoder_moe or ours.moe)
    )
    return dataclasses.replace(
        published,
        network=network,
        moe=encoder,
        decoder_moe=None if decoder == encoder else decoder,
        dtype=ours.dtype,
    )
