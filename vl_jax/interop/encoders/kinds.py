"""Published encoders of texts and sounds by model type: what single parts of a model can begin with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields
from typing import Any

from vl_jax.encoders.language.bert import BertConfig
from vl_jax.encoders.language.transformer_xl import TransformerXLConfig
from vl_jax.encoders.sound.wav2vec2 import Wav2Vec2Config
from vl_jax.interop.encoders.bert import bert_rules, bert_stacks, read_bert
from vl_jax.interop.encoders.names import Fields
from vl_jax.interop.encoders.sound import read_wav2vec2, wav2vec2_rules
from vl_jax.interop.encoders.transformer_xl import read_transformer_xl, transformer_xl_rules
from vl_jax.interop.rules import Rule

Stacks = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class PublishedKind:
    """How encoders of one model type are read."""

    config: type  # ours
    read: Callable[[Fields], Any]  # a published config as ours
    # Where the tensors go, and the layers of each stack: of a config of ours, the names of the tensors, what
    # comes before them, and what comes before our paths.
    rules: Callable[[Any, Collection[str], str, str], tuple[tuple[Rule, ...], Stacks]]
    anchor: str  # a tensor that every checkpoint has
    free: tuple[str, ...]  # fields in which ours may differ, for no tensor depends on them


KINDS: dict[str, PublishedKind] = {
    "bert": PublishedKind(
        BertConfig,
        read_bert,
        lambda config, _, source, target: (
            bert_rules(source=source, target=target),
            bert_stacks(config),
        ),
        "embeddings.word_embeddings.weight",
        ("max_length", "causal", "pooler", "moe", "sparse_layers"),
    ),
    "transfo-xl": PublishedKind(
        TransformerXLConfig,
        read_transformer_xl,
        lambda config, keys, source, target: (
            transformer_xl_rules(config, keys, source=source, target=target),
            {},
        ),
        "word_emb.emb_layers.0.weight",
        ("max_length", "memory", "farthest", "same_length", "remember_zeros"),
    ),
    "wav2vec2": PublishedKind(
        Wav2Vec2Config,
        read_wav2vec2,
        lambda _, keys, source, target: (wav2vec2_rules(keys, source=source, target=target), {}),
        "feature_projection.projection.weight",
        ("max_samples", "rate", "normalize"),
    ),
}


def kind_of(config: Any) -> str | None:
    """The model type whose weights an encoder of ours can take; None: it is none of these."""
    return next((name for name, kind in KINDS.items() if isinstance(config, kind.config)), None)


def differences(ours: Any, theirs: Any, kind: str) -> Iterator[tuple[str, Any, Any]]:
    """(field, ours, theirs) of what must be alike; a text may be shorter than in the table of positions."""
    found = KINDS[kind]
    for field in fields(found.config):
        mine, given = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name not in found.free and mine != given:
            yield field.name, mine, given
    if kind == "bert" and ours.max_length > theirs.max_length:
        yield "max_length", ours.max_length, theirs.max_length
