"""Published wav2vec 2.0: its config as ours, and where each of its tensors goes.

What a published ``config.json`` leaves out takes the default of the official class.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vl_jax.encoders.sound.wav2vec2 import Wav2Vec2Config
from vl_jax.encoders.sound.wave_features import WaveFeaturesConfig
from vl_jax.heads.transcript import Transcript
from vl_jax.interop.encoders import names
from vl_jax.interop.encoders.names import Fields
from vl_jax.interop.rules import Rule
from vl_jax.joint import JointConfig, Tower

DEFAULTS: Fields = {
    "vocab_size": 32,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "conv_dim": (512,) * 7,
    "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
    "conv_stride": (5, 2, 2, 2, 2, 2, 2),
    "conv_bias": False,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "do_stable_layer_norm": False,
    "add_adapter": False,
    "adapter_attn_dim": None,
    "pad_token_id": 0,
    "ctc_loss_reduction": "sum",
}
# What masks features in training, and the parts of pretraining.
IGNORED = (r"(.*\.)?masked_spec_embed", r"(quantizer|project_q|project_hid)\..*")
_POSITIONS = "encoder.pos_conv_embed.conv."
_NORMS = {"group": "first", "layer": "each"}


def read_wav2vec2(config: Fields) -> Wav2Vec2Config:
    """Our configuration of a published encoder.

    Raises:
      ValueError: an option is not supported.
    """
    c = {**DEFAULTS, **config}
    names.only(c, "feat_extract_norm", *_NORMS)
    names.only(c, "add_adapter", False)
    names.only(c, "adapter_attn_dim", None)
    norm: Any = _NORMS[c["feat_extract_norm"]]
    features = WaveFeaturesConfig(
        dims=tuple(c["conv_dim"]),
        kernels=tuple(c["conv_kernel"]),
        strides=tuple(c["conv_stride"]),
        use_bias=c["conv_bias"],
        norm=norm,
        activation=names.activation(c, "feat_extract_activation"),
    )
    return Wav2Vec2Config(
        features,
        embed_dim=c["hidden_size"],
        mlp_dim=c["intermediate_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        activation=names.activation(c, "hidden_act"),
        norm_epsilon=c["layer_norm_eps"],
        norms_follow=not c["do_stable_layer_norm"],
        position_kernel=c["num_conv_pos_embeddings"],
        position_groups=c["num_conv_pos_embedding_groups"],
    )


def read_speech(config: Fields) -> JointConfig:
    """A published recogniser of speech as a tower and a head; its symbols have numbers, no letters.

    Raises:
      ValueError: an option is not supported.
    """
    c = {**DEFAULTS, **config}
    names.only(c, "ctc_loss_reduction", "sum", "mean")
    blank = c["pad_token_id"]
    symbols = tuple("" if i == blank else f"<{i}>" for i in range(c["vocab_size"]))
    head = Transcript(symbols, blank, by_symbol=c["ctc_loss_reduction"] == "mean")
    return JointConfig(towers=(Tower("sound", read_wav2vec2(config), "wave"),), heads=(head,))


def wav2vec2_rules(keys: Collection[str], *, source: str = "wav2vec2.", target: str = "") -> tuple[Rule, ...]:
    """Where the tensors of the encoder go.

    Args:
      keys: the names in the checkpoint: older ones call the parts of the positions' kernel otherwise.
      source: comes before every name in the checkpoint.
      target: comes before every path of ours.
    """
    old = f"{source}{_POSITIONS}weight_g" in keys
    parts = ("weight_g", "weight_v") if old else tuple(f"parametrizations.weight.original{i}" for i in (0, 1))
    convs = {
        int(key.removeprefix(_CONVS.format(source)).partition(".")[0])
        for key in keys
        if key.startswith(_CONVS.format(source))
    }
    outer: list[names.Row] = []
    for i in sorted(convs):
        outer += [
            (f"feature_extractor.conv_layers.{i}.conv.weight", f"features/conv{i}/kernel", "o i k -> k i o"),
            (f"feature_extractor.conv_layers.{i}.conv.bias", f"features/conv{i}/bias", "o -> o"),
            *names.norm(f"feature_extractor.conv_layers.{i}.layer_norm", f"features/conv{i}/norm"),
        ]
    outer += [
        *names.norm("feature_projection.layer_norm", "features_norm"),
        *names.linear("feature_projection.projection", "project"),
        (_POSITIONS + parts[0], "positions/magnitude", "1 1 k -> k"),
        (_POSITIONS + parts[1], "positions/direction", "o i k -> k i o"),
        (_POSITIONS + "bias", "positions/bias", "o -> o"),
        *names.norm("encoder.layer_norm", "norm"),
    ]
    inner = (
        *names.attention("attention.{part}_proj", "attention.out_proj", ("q", "k", "v")),
        *names.norm("layer_norm", "norm1"),
        *names.linear("feed_forward.intermediate_dense", "fc1"),
        *names.linear("feed_forward.output_dense", "fc2"),
        *names.norm("final_layer_norm", "norm2"),
    )
    layer = source + "encoder.layers.{layer}."
    blocks = names.layer_rules(inner, layer, target, stack="blocks")
    return (*names.outer_rules(outer, source, target), *blocks)


_CONVS = "{}feature_extractor.conv_layers."


def speech_rules(keys: Collection[str]) -> tuple[Rule, ...]:
    """Where the tensors of a recogniser of speech go, in a checkpoint with these names."""
    head = names.outer_rules(names.linear("lm_head", "symbols"), "", "transcript/")
    return (*wav2vec2_rules(keys, target="sound/"), *head)
