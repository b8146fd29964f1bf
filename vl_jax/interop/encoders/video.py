"""Published encoders of clips: their configs as ours, and where each of their tensors goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vl_jax.encoders.video.masked import MaskedClipsConfig
from vl_jax.encoders.video.resnet3d import VideoResNetConfig
from vl_jax.encoders.video.videomae import VideoMAEConfig
from vl_jax.interop.conv import ACTIVATIONS
from vl_jax.interop.rules import Rule

Fields = Mapping[str, Any]

_DEFAULTS = {
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "num_frames": 16,
    "tubelet_size": 2,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "use_mean_pooling": True,
    "decoder_num_attention_heads": 6,
    "decoder_hidden_size": 384,
    "decoder_num_hidden_layers": 4,
    "decoder_intermediate_size": 1536,
    "norm_pix_loss": True,
}


def read_videomae(config: Fields) -> MaskedClipsConfig:
    """Our configuration of a published VideoMAE, with the decoder of its pre-training.

    Raises:
      ValueError: an option is not supported.
    """
    c = {**_DEFAULTS, **config}
    if c["hidden_act"] not in ACTIVATIONS:
        raise ValueError(f"hidden_act={c['hidden_act']!r}: known are {', '.join(ACTIVATIONS)}")
    size = c["image_size"]
    # Of clips that are not coloured, pixels are targets as they are given.
    levels = {} if c["num_channels"] == 3 else {"pixel_mean": 0.0, "pixel_std": 1.0}
    encoder = VideoMAEConfig(
        image_size=tuple(size) if isinstance(size, (list, tuple)) else size,
        num_frames=c["num_frames"],
        patch_size=c["patch_size"],
        tubelet=c["tubelet_size"],
        num_channels=c["num_channels"],
        embed_dim=c["hidden_size"],
        mlp_dim=c["intermediate_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        activation=ACTIVATIONS[c["hidden_act"]],  # pyright: ignore[reportArgumentType]
        norm_epsilon=c["layer_norm_eps"],
        qkv_bias=c.get("qv_bias", c.get("qkv_bias", True)),  # it has had both names
        final_norm=not c["use_mean_pooling"],
        **levels,
    )
    return MaskedClipsConfig(
        encoder,
        embed_dim=c["decoder_hidden_size"],
        mlp_dim=c["decoder_intermediate_size"],
        num_layers=c["decoder_num_hidden_layers"],
        num_heads=c["decoder_num_attention_heads"],
        normed=c["norm_pix_loss"],
    )


def videomae_rules(source: str = "videomae.", target: str = "") -> tuple[Rule, ...]:
    """Where the tensors of an encoder go.

    Args:
      source: comes before every name in the checkpoint; "" in one that holds the encoder alone.
      target: comes before every path of ours.
    """
    stem = "embeddings.patch_embeddings.projection"
    return (
        Rule(f"{source}{stem}.weight", f"{target}kernel", "d c t p q -> t p q c d"),
        Rule(f"{source}{stem}.bias", f"{target}bias", "d -> d"),
        *_blocks(f"{source}encoder.layer.{{layer}}.", f"{target}blocks/"),
        *_norm(f"{source}layernorm", f"{target}norm"),
    )


def masked_clips_rules(target: str = "") -> tuple[Rule, ...]:
    """Where the tensors of the whole model of pre-training go."""
    return (
        *videomae_rules(target=f"{target}encoder/"),
        Rule("encoder_to_decoder.weight", f"{target}project/kernel", "o i -> i o"),
        Rule("mask_token", f"{target}mask_token", "1 1 d -> d"),
        *_blocks("decoder.decoder_layers.{layer}.", f"{target}decoder/blocks/"),
        *_norm("decoder.norm", f"{target}decoder/norm"),
        Rule("decoder.head.weight", f"{target}decoder/head/kernel", "o i -> i o"),
        Rule("decoder.head.bias", f"{target}decoder/head/bias", "o -> o"),
    )


def _norm(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.weight", f"{target}/scale", "d -> d"),
        Rule(f"{source}.bias", f"{target}/bias", "d -> d"),
    )


def _blocks(source: str, target: str) -> tuple[Rule, ...]:
    """The blocks of encoder and decoder; keys have no bias."""
    inner, parts = "attention.attention.", ("query", "key", "value")
    rows = [
        ("attention.output.dense.weight", "attention/project", "d (n h) -> layer n h d"),
        ("attention.output.dense.bias", "attention/project_bias", "d -> layer d"),
    ]
    for theirs, ours in (("layernorm_before", "norm1"), ("layernorm_after", "norm2")):
        rows.append((f"{theirs}.weight", f"{ours}/scale", "d -> layer d"))
        rows.append((f"{theirs}.bias", f"{ours}/bias", "d -> layer d"))
    for theirs, ours in (("intermediate", "fc1"), ("output", "fc2")):
        rows.append((f"{theirs}.dense.weight", f"{ours}/kernel", "o i -> layer i o"))
        rows.append((f"{theirs}.dense.bias", f"{ours}/bias", "o -> layer o"))
    qkv, bias = f"{source}{inner}{{part}}.weight", f"{source}{inner}{{part}}_bias"
    return (
        Rule(qkv, f"{target}attention/qkv", "layer part (n h) d -> layer d part n h", parts),
        Rule(bias, f"{target}attention/qv_bias", "layer part (n h) -> layer part n h", ("q", "v")),
        *(Rule(source + name, target + path, f"layer {axes}") for name, path, axes in rows),
    )


# torchvision 0.25, models/video/resnet.py.
ARCHITECTURES = {"r3d_18": VideoResNetConfig()}
# Counts of batches, and the classifier behind the encoder.
R3D_IGNORED = (r".*\.num_batches_tracked", r"fc\.(weight|bias)")


def read_r3d(config: Fields) -> VideoResNetConfig:
    """Our configuration of a 3D residual network of torchvision, by ``architecture``.

    Raises:
      ValueError: it is not known.
    """
    name = config.get("architecture")
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture={name!r}: known are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def r3d_rules(
    config: VideoResNetConfig, source: str = "", target: str = "params/", statistics: str = "batch_stats/"
) -> tuple[Rule, ...]:
    """Where the tensors of a 3D residual network go: its parameters, and its running statistics."""
    # (names of convolution and norm, module of ours, numbers of the blocks that ours stacks)
    convs: list[tuple[str, str, str, tuple[str, ...]]] = [("stem.0", "stem.1", "stem", ())]
    parts = [(f"conv{i + 1}", f"conv{i}") for i in (0, 1)] + [("downsample", "shortcut")]
    for i, blocks in enumerate(config.stage_blocks):
        for theirs, ours in parts:
            stage, others = f"layer{i + 1}", tuple(str(n) for n in range(1, blocks))
            first = f"{stage}.0.{theirs}"
            convs.append((f"{first}.0", f"{first}.1", f"stage{i}_first/{ours}", ()))
            if others:
                other = f"{stage}.{{part}}.{theirs}"
                convs.append((f"{other}.0", f"{other}.1", f"stage{i}_others/{ours}", others))
    rules: list[Rule] = []
    for conv, norm, ours, others in convs:
        before = "part " if others else ""
        kernel, vector = f"{before}o i t p q -> {before}t p q i o", f"{before}d -> {before}d"
        rules.append(Rule(f"{source}{conv}.weight", f"{target}{ours}/conv/kernel", kernel, others))
        for name, tree, path in (
            ("weight", target, "scale"),
            ("bias", target, "bias"),
            ("running_mean", statistics, "mean"),
            ("running_var", statistics, "variance"),
        ):
            rules.append(Rule(f"{source}{norm}.{name}", f"{tree}{ours}/norm/{path}", vector, others))
    return tuple(rules)
