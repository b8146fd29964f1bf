"""Published BERT: its config as ours, and where each of its tensors goes.

What a published ``config.json`` leaves out takes the default of the official class.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vl_jax.encoders.language.bert import BertConfig
from vl_jax.interop.encoders import names
from vl_jax.interop.encoders.names import Fields
from vl_jax.interop.rules import Rule

DEFAULTS: Fields = {
    "vocab_size": 30_522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
# Numbers 0, 1, 2, ... in older files.
IGNORED = (r"(.*\.)?position_ids",)
_DECODER = "cls.predictions.decoder."


def read_bert(config: Fields) -> BertConfig:
    """Our configuration of a published encoder.

    Raises:
      ValueError: an option is not supported.
    """
    c = {**DEFAULTS, **config}
    names.only(c, "position_embedding_type", "absolute")
    names.only(c, "add_cross_attention", False)
    return BertConfig(
        vocab_size=c["vocab_size"],
        max_length=c["max_position_embeddings"],
        token_types=c["type_vocab_size"],
        embed_dim=c["hidden_size"],
        mlp_dim=c["intermediate_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        activation=names.activation(c, "hidden_act"),
        norm_epsilon=c["layer_norm_eps"],
        causal=c["is_decoder"],
    )


def is_tied(config: Fields) -> bool:
    """Whether the table of words scores them too."""
    return bool({**DEFAULTS, **config}["tie_word_embeddings"])


def bert_rules(*, source: str = "bert.", target: str = "") -> tuple[Rule, ...]:
    """Where the tensors of the encoder go.

    Args:
      source: comes before every name in the checkpoint.
      target: comes before every path of ours.
    """
    outer = (
        ("embeddings.word_embeddings.weight", "embedding", "v d -> v d"),
        ("embeddings.position_embeddings.weight", "positions", "t d -> t d"),
        ("embeddings.token_type_embeddings.weight", "types", "k d -> k d"),
        *names.norm("embeddings.LayerNorm", "embedded_norm"),
        *names.linear("pooler.dense", "pooler"),
    )
    inner = (
        *names.attention("attention.self.{part}", "attention.output.dense", ("query", "key", "value")),
        *names.norm("attention.output.LayerNorm", "norm1"),
        *names.linear("intermediate.dense", "fc1"),
        *names.linear("output.dense", "fc2"),
        *names.norm("output.LayerNorm", "norm2"),
    )
    layer = source + "encoder.layer.{layer}."
    return (*names.outer_rules(outer, source, target), *names.layer_rules(inner, layer, target))


def bert_stacks(config: BertConfig) -> dict[str, tuple[int, ...]]:
    """The layers each stack of parameters holds, for ``rules.plan``."""
    return {run.name: run.layers for run in config.block.runs}


def pretraining_rules(keys: Collection[str]) -> tuple[Rule, ...]:
    """Where the tensors of ``BertPretraining`` go, in a checkpoint with these names."""
    # The bias has two names; files that hold both mean that of the decoder, which is the one that is added.
    bias = _DECODER + "bias" if _DECODER + "bias" in keys else "cls.predictions.bias"
    rows: Any = (
        *names.linear("cls.predictions.transform.dense", "transform"),
        *names.norm("cls.predictions.transform.LayerNorm", "norm"),
        (_DECODER + "weight", "words", "v d -> v d"),
        (bias, "words_bias", "v -> v"),
        *names.linear("cls.seq_relationship", "follows"),
    )
    return (*bert_rules(target="encoder/"), *names.outer_rules(rows, "", ""))


def pretraining_ignored(config: Fields, keys: Collection[str]) -> tuple[str, ...]:
    """Patterns of tensors that repeat others, and so go unused."""
    again = (r"cls\.predictions\.decoder\.weight",) if is_tied(config) else ()
    bias = (r"cls\.predictions\.bias",) if _DECODER + "bias" in keys else ()
    return (*IGNORED, *again, *bias)
