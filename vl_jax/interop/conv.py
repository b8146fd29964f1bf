"""Published image encoders with convolutions: their configs as ours, and where each of their tensors goes.

SAM, the high-resolution branch of DeepSeek-VL around it, and residual networks. What a published
``config.json`` leaves out takes the default of the official class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vl_jax.encoders.high_resolution import HighResolutionConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.encoders.sam import SAMConfig
from vl_jax.interop.rules import Rule

Fields = Mapping[str, Any]

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Counts the batches that the running statistics have seen; nothing depends on it.
RESNET_IGNORED = (r".*\.num_batches_tracked",)

_SAM = {
    "image_size": 1024,
    "patch_size": 16,
    "hidden_size": 768,
    "mlp_dim": None,
    "mlp_ratio": 4.0,
    "output_channels": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "window_size": 14,
    "global_attn_indexes": (2, 5, 8, 11),
    "use_abs_pos": True,
    "use_rel_pos": True,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
_RESNET = {
    "embedding_size": 64,
    "hidden_sizes": (256, 512, 1024, 2048),
    "depths": (3, 4, 6, 3),
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}
# Of the low-resolution tower, as far as the high-resolution branch depends on it.
_SIGLIP = {"image_size": 224, "patch_size": 16}


def read_sam(config: Fields) -> SAMConfig:
    """Our configuration of a published SAM image encoder (``sam_vision_model``)."""
    c = {**_SAM, **config}
    layers, mlp_dim = c["num_hidden_layers"], c["mlp_dim"]
    return SAMConfig(
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        embed_dim=c["hidden_size"],
        mlp_dim=int(c["hidden_size"] * c["mlp_ratio"]) if mlp_dim is None else mlp_dim,
        output_dim=c["output_channels"],
        num_layers=layers,
        num_heads=c["num_attention_heads"],
        window=c["window_size"],
        # The official class takes numbers of layers that do not exist, and they change nothing.
        global_layers=tuple(i for i in c["global_attn_indexes"] if 0 <= i < layers),
        absolute_positions=c["use_abs_pos"],
        relative_positions=c["use_rel_pos"],
        qkv_bias=c["qkv_bias"],
        activation=_known(c, "hidden_act", ACTIVATIONS),
        norm_epsilon=c["layer_norm_eps"],
    )


def read_high_resolution(config: Fields) -> HighResolutionConfig:
    """Our configuration of the high-resolution branch of a published ``deepseek_vl_hybrid``.

    Raises:
      ValueError: the first of the encoder's global layers, whose output the branch needs, does not exist.
    """
    low = {**_SIGLIP, **(config.get("vision_config") or {})}
    published = {**_SAM, **(config.get("high_res_vision_config") or {})}
    encoder = read_sam(published)
    if list(encoder.global_layers[:1]) != list(published["global_attn_indexes"][:1]):
        raise ValueError(
            f"global_attn_indexes={published['global_attn_indexes']}: the first must be from 0 to "
            f"{encoder.num_layers - 1}"
        )
    return HighResolutionConfig(encoder, grid=low["image_size"] // low["patch_size"])


def read_resnet(config: Fields) -> ResNetConfig:
    """Our configuration of a published residual network (``resnet``)."""
    c = {**_RESNET, **config}
    blocks = {"basic": "basic", "bottleneck": "bottleneck"}
    return ResNetConfig(
        stem_dim=c["embedding_size"],
        stage_dims=tuple(c["hidden_sizes"]),
        stage_blocks=tuple(c["depths"]),
        block=_known(c, "layer_type", blocks),
        bottleneck_stride="1x1" if c["downsample_in_bottleneck"] else "3x3",
        first_stage_stride=2 if c["downsample_in_first_stage"] else 1,
        activation=_known(c, "hidden_act", {**ACTIVATIONS, "selu": "selu"}),
    )


def _known(c: Fields, key: str, names: Mapping[str, Any]) -> Any:
    """Our name of a published choice."""
    if c[key] not in names:
        raise ValueError(f"{key}={c[key]!r}: known are {', '.join(names)}")
    return names[c[key]]


def _conv(source: str, target: str) -> Rule:
    return Rule(source + ".weight", target + "/kernel", "o i p q -> p q i o")


def _linear(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(source + ".weight", target + "/kernel", "o i -> i o"),
        Rule(source + ".bias", target + "/bias", "o -> o"),
    )


def _norm(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(source + ".weight", target + "/scale", "d -> d"),
        Rule(source + ".bias", target + "/bias", "d -> d"),
    )


def sam_rules(source: str = "vision_encoder.", target: str = "") -> tuple[Rule, ...]:
    """Where the tensors of a published SAM image encoder go; rules of absent parameters do not apply."""
    here, there = source + "layers.{layer}.", target + "{stack}/"
    rows = (
        ("attn.qkv.weight", "attention/qkv", "(s n h) d -> layer d s n h"),
        ("attn.qkv.bias", "attention/qkv_bias", "(s n h) -> layer s n h"),
        ("attn.rel_pos_h", "attention/rows", "z h -> layer z h"),
        ("attn.rel_pos_w", "attention/columns", "z h -> layer z h"),
        ("attn.proj.weight", "attention/project/kernel", "o i -> layer i o"),
        ("attn.proj.bias", "attention/project/bias", "o -> layer o"),
        ("layer_norm1.weight", "norm1/scale", "d -> layer d"),
        ("layer_norm1.bias", "norm1/bias", "d -> layer d"),
        ("layer_norm2.weight", "norm2/scale", "d -> layer d"),
        ("layer_norm2.bias", "norm2/bias", "d -> layer d"),
        ("mlp.lin2.weight", "mlp/w_out", "d f -> layer f d"),
        ("mlp.lin2.bias", "mlp/b_out", "d -> layer d"),
    )
    return (
        _conv(source + "patch_embed.projection", target + "stem"),
        Rule(source + "patch_embed.projection.bias", target + "stem/bias", "d -> d"),
        Rule(source + "pos_embed", target + "positions", "1 u v d -> u v d"),
        *(Rule(here + name, there + path, f"layer {axes}") for name, path, axes in rows),
        # The only projection into the block is the whole of the axis on which gated blocks have two.
        Rule(here + "mlp.{part}.weight", there + "mlp/w_in", "layer part f d -> layer d part f", ("lin1",)),
        Rule(here + "mlp.{part}.bias", there + "mlp/b_in", "layer part f -> layer part f", ("lin1",)),
        *_neck(source + "neck.", target + "neck/"),
    )


def sam_stacks(config: SAMConfig) -> dict[str, tuple[int, ...]]:
    """The layers that each stack of parameters holds, for ``rules.plan``."""
    return {run.name: run.layers for run in config.runs}


def _neck(source: str, target: str) -> tuple[Rule, ...]:
    return (
        _conv(source + "conv1", target + "conv1"),
        *_norm(source + "layer_norm1", target + "norm1"),
        _conv(source + "conv2", target + "conv2"),
        *_norm(source + "layer_norm2", target + "norm2"),
    )


def high_resolution_rules(source: str = "model.", target: str = "high/") -> tuple[Rule, ...]:
    """Where the tensors of the high-resolution branch go; the stacks are those of its encoder."""
    return (
        *sam_rules(source + "high_res_vision_model.vision_encoder.", target + "encoder/"),
        *_neck(source + "high_res_vision_neck.", target + "neck/"),
        _conv(source + "high_res_vision_proj.conv1", target + "reduce/conv1"),
        _conv(source + "high_res_vision_proj.conv2", target + "reduce/conv2"),
        Rule(source + "high_res_vision_alpha", target + "share", "1 ->"),
    )


def aligner_rules(source: str = "model.aligner.", target: str = "aligner/") -> tuple[Rule, ...]:
    """Where the tensors of the aligner of two resolutions go."""
    return (
        *_linear(source + "vision_proj", target + "low"),
        *_linear(source + "high_res_vision_proj", target + "high"),
        *_linear(source + "proj", target + "project"),
    )


def resnet_rules(
    config: ResNetConfig, source: str = "", target: str = "params/", statistics: str = "batch_stats/"
) -> tuple[Rule, ...]:
    """Where the tensors of a published residual network go: its parameters, and its running statistics."""
    # (module of theirs, module of ours, whether ours is a stack, names of the blocks in it)
    convs: list[tuple[str, str, tuple[str, ...]]] = [("embedder.embedder", "stem", ())]
    parts = [(f"layer.{i}", f"conv{i}") for i in range(len(config.convolutions(1, 1)))]
    for i, blocks in enumerate(config.stage_blocks):
        for theirs, ours in (*parts, ("shortcut", "shortcut")):
            stage = f"encoder.stages.{i}.layers."
            convs.append((f"{stage}0.{theirs}", f"stage{i}_first/{ours}", ()))
            others = tuple(str(block) for block in range(1, blocks))
            if others:
                convs.append((f"{stage}{{part}}.{theirs}", f"stage{i}_others/{ours}", others))
    rules: list[Rule] = []
    for theirs, ours, others in convs:
        kernel, vector = ("part o i p q -> part p q i o", "part d -> part d") if others else _PLAIN
        rules += [
            Rule(f"{source}{theirs}.convolution.weight", f"{target}{ours}/conv/kernel", kernel, others),
            *(
                Rule(f"{source}{theirs}.normalization.{name}", f"{tree}{ours}/norm/{path}", vector, others)
                for name, tree, path in (
                    ("weight", target, "scale"),
                    ("bias", target, "bias"),
                    ("running_mean", statistics, "mean"),
                    ("running_var", statistics, "variance"),
                )
            ),
        ]
    return tuple(rules)


_PLAIN = ("o i p q -> p q i o", "d -> d")
