"""Published Transformer-XL: its config as ours, and where each of its tensors goes.

What a published ``config.json`` leaves out takes the default of the official class.
"""

from __future__ import annotations

from collections.abc import Collection

from vl_jax.encoders.language.adaptive import AdaptiveConfig
from vl_jax.encoders.language.transformer_xl import TransformerXLConfig
from vl_jax.interop.encoders import names
from vl_jax.interop.encoders.names import Fields
from vl_jax.interop.rules import Rule

DEFAULTS: Fields = {
    "vocab_size": 267_735,
    "cutoffs": (20_000, 40_000, 200_000),
    "d_model": 1024,
    "d_embed": 1024,
    "n_head": 16,
    "d_head": 64,
    "d_inner": 4096,
    "div_val": 4,
    "pre_lnorm": False,
    "n_layer": 18,
    "mem_len": 1600,
    "clamp_len": 1000,
    "same_length": True,
    "proj_share_all_but_first": True,
    "attn_type": 0,
    "untie_r": True,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
# Follows from the width of the model.
IGNORED = (r"(.*\.)?pos_emb\.inv_freq",)


def read_transformer_xl(config: Fields) -> TransformerXLConfig:
    """Our configuration of a published model.

    Raises:
      ValueError: an option is not supported.
    """
    c = {**DEFAULTS, **config}
    names.only(c, "attn_type", 0)
    cutoffs = tuple(c["cutoffs"])
    # A checkpoint's list, where it has one, wins over the option that once stood for it.
    tied = c.get("tie_projs")
    tied = (False, *(bool(c["proj_share_all_but_first"]),) * len(cutoffs)) if tied is None else tied
    return TransformerXLConfig(
        words=AdaptiveConfig(
            vocab_size=c["vocab_size"],
            cutoffs=cutoffs,
            embed_dim=c["d_embed"],
            shrink=c["div_val"],
            tied=c["tie_word_embeddings"],
            tied_projections=tuple(map(bool, tied)),
        ),
        embed_dim=c["d_model"],
        mlp_dim=c["d_inner"],
        num_layers=c["n_layer"],
        num_heads=c["n_head"],
        head_dim=c["d_head"],
        memory=c["mem_len"],
        farthest=max(c["clamp_len"], 0),
        same_length=c["same_length"],
        norms_follow=not c["pre_lnorm"],
        share_biases=not c["untie_r"],
        norm_epsilon=c["layer_norm_epsilon"],
        remember_zeros=True,
    )


def transformer_xl_rules(
    config: TransformerXLConfig, keys: Collection[str], *, source: str = "transformer.", target: str = ""
) -> tuple[Rule, ...]:
    """Where the tensors of the encoder go, in a checkpoint with these names.

    Args:
      keys: tensors that share their numbers are stored under the name of one.
      source: comes before every name in the checkpoint.
      target: comes before every path of ours.
    """
    shared = f"{source}{{part}}" if f"{source}r_w_bias" in keys else f"{source}layers.0.dec_attn.{{part}}"
    biases = ("r_w_bias", "r_r_bias")
    inner = (
        ("dec_attn.qkv_net.weight", "attention/qkv", "(x n h) d -> d x n h"),
        ("dec_attn.r_net.weight", "attention/distance", "(n h) d -> d n h"),
        ("dec_attn.o_net.weight", "attention/output", "d (n h) -> n h d"),
        ("dec_attn.{part}", "attention/biases", "part n h -> part n h", biases),
        *names.norm("dec_attn.layer_norm", "norm1"),
        *names.linear("pos_ff.CoreNet.0", "fc1"),
        *names.linear("pos_ff.CoreNet.3", "fc2"),
        *names.norm("pos_ff.layer_norm", "norm2"),
    )
    rules: list[Rule] = []
    words, clusters = config.words, range(len(config.words.bounds) - 1)
    for i in range(len(words.tables)):
        tied = [c for c in clusters if words.shares_projection(c) and (words.shrink == 1 or c == i)]
        table = [f"{source}word_emb.emb_layers.{i}.weight", *[f"crit.out_layers.{i}.weight"] * words.tied]
        projection = [f"{source}word_emb.emb_projs.{i}", *(f"crit.out_projs.{c}" for c in tied)]
        rules += [
            Rule(_stored(table, keys), f"{target}embedding/table{i}", "v e -> v e"),
            Rule(_stored(projection, keys), f"{target}embedding/project{i}", "d e -> e d"),
        ]
    return (
        *rules,
        Rule(shared, f"{target}biases", "part n h -> part n h", biases),
        *names.layer_rules(inner, source + "layers.{layer}.", target, stack="blocks"),
    )


def _stored(candidates: list[str], keys: Collection[str]) -> str:
    """The name under which a tensor is stored that has several; the first, if it is under none."""
    return next((name for name in candidates if name in keys), candidates[0])


def next_word_rules(config: TransformerXLConfig, keys: Collection[str]) -> tuple[Rule, ...]:
    """Where the tensors of ``NextWord`` go, in a checkpoint with these names."""
    rows: list[names.Row] = [
        ("cluster_weight", "clusters", "k e -> k e"),
        ("cluster_bias", "clusters_bias", "k -> k"),
    ]
    for i in range(len(config.words.bounds) - 1):
        rows += [
            (f"out_layers.{i}.weight", f"table{i}", "v e -> v e"),
            (f"out_layers.{i}.bias", f"bias{i}", "v -> v"),
            (f"out_projs.{i}", f"project{i}", "d e -> e d"),
        ]
    return (
        *transformer_xl_rules(config, keys, target="encoder/"),
        *names.outer_rules(rows, "crit.", "words/"),
    )


def ignored(config: TransformerXLConfig) -> tuple[str, ...]:
    """Patterns of tensors that repeat others, or follow from the config, and so may go unused."""
    words, again = config.words, list(IGNORED)
    again += [r"crit\.out_layers\.\d+\.weight"] * words.tied
    again += [rf"crit\.out_projs\.{i}" for i in range(len(words.bounds) - 1) if words.shares_projection(i)]
    again += [r".*\.dec_attn\.r_[wr]_bias"] * config.share_biases
    return tuple(again)
